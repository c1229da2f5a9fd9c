"""The loss by chunks is the library's, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turbosparse.hf.load import load_model
from turbosparse.training.loss import chunked_loss

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
