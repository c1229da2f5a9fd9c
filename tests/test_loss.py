"""The loss by chunks is the library's, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from turbosparse.hf.load import load_model
from turbosparse.training.loss import Teacher, chunked_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])  # one of them with tied weights
@pytest.mark.parametrize(("bf16", "near"), [(False, 1e-5), (True, 2e-2)])
def test_chunks_give_the_same_loss_and_gradients(
    dense: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    bf16: bool,
    near: float,
) -> None:
    model = load_model(dense(family), activation="drelu", dtype=torch.float32)
    monkeypatch.setattr("turbosparse.training.loss._ENTRIES", 7 * model.config.vocab_size)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3:9] = -100

    def step(**named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=labels, **named).loss
        (2 * loss).backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    for named in ({}, {"num_items_in_batch": torch.tensor(50)}):
        whole, gradients = step(**named)
        with chunked_loss(model):
            loss, mine = step(**named)
        torch.testing.assert_close(loss, whole, rtol=near, atol=0)
        for name, gradient in gradients.items():
            assert (mine[name] - gradient).norm() <= near * gradient.norm(), name
    assert model(input_ids=ids).logits.shape[-1] == model.config.vocab_size, "all is as before"


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_teacher_is_learnt_from_as_the_divergence_says(
    dense: Callable[[str], Path], weight: float
) -> None:
    student = load_model(dense("qwen2"), activation="drelu", dtype=torch.float32)
    tutor = load_model(dense("qwen2"), dtype=torch.float32).requires_grad_(False)
    student.resize_token_embeddings(student.config.vocab_size + 5)  # it may know more tokens
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3:9] = -100

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        student.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in student.named_parameters()}

    out = student(input_ids=ids, labels=labels)
    known = labels[:, 1:] != -100
    logs = out.logits[:, :-1][known].log_softmax(-1)
    taught = tutor(input_ids=ids).logits[:, :-1][known].log_softmax(-1)
    divergence = kl_div(logs[:, :-5], taught, reduction="sum", log_target=True) / known.sum()
    wanted = (1 - weight) * out.loss + weight * divergence
    direct = gradients(wanted)
    with chunked_loss(student, Teacher(tutor, weight)):
        mine = student(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=0)
    for name, gradient in gradients(mine).items():
        torch.testing.assert_close(gradient, direct[name], rtol=1e-4, atol=1e-6, msg=name)
    student(input_ids=ids, labels=labels)  # asks nobody any more
