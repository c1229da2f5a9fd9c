"""Feed-forwards split between a card and the C++ core, and what moves from one to the other.

Without a card threads stand in for it. No test looks at a clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shared, make_model
from greedy import CLEAR
from test_gpu import (
    CPU,
    DEVICE,
    HIDDEN,
    SAME_SUM,
    feed_forward,
    greedy,
    inputs,
    nothing_is_zero_by_chance,  # noqa: F401
    predictors,
    random,
    relative_rms,
)

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.engine.engine import Engine
from turbosparse.ops import hybrid, reference
from turbosparse.ops.card import Card, card
from turbosparse.ops.gpu import SPAN
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.quant import quantise_ffn
from turbosparse.ops.rows import FFNRows
from turbosparse.pack import pack

SPANS = 5
NEURONS = SPANS * SPAN + 10  # and a shorter one
TOKENS = 6  # a prompt, then steps: the first to count, one to send, one to arrive, and some more
LONG = 60.0  # seconds: a bound on hanging, not on a result


def split_of(
    rows: list[FFNRows], own: list[PackedPredictor], hot: int, where: Card | None = None
) -> hybrid.Experts:
    return hybrid.Experts(rows, "drelu", 2, own, hot=hot, card=where or card(DEVICE))


def truth_of(
    rows: list[FFNRows],
    own: list[PackedPredictor],
    x: torch.Tensor,
    residual: torch.Tensor,
    mode: ops.Mode,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the chosen experts, and their counts, by the reference."""
    with CPU:
        out, counts = torch.zeros(len(x), HIDDEN), torch.zeros(len(x), 3, dtype=torch.int32)
    for expert, one in enumerate(rows):
        with CPU:
            neurons = reference.Neurons(one, "drelu", 1, own[expert] if own else None)
            y, used = neurons.forward(x.cpu(), residual.cpu(), mode=mode)
        here = (chosen == expert).cpu()
        out += y * (weights.cpu() * here).sum(1, keepdim=True)
        counts += used * here.sum(1, keepdim=True)
    return out, counts


@pytest.mark.parametrize(
    ("experts", "kind", "hot", "tokens"),
    [
        (1, "low_rank", 0, 2),
        (1, "sign", 2 * SPAN, 1),
        (1, "low_rank", 5 * SPAN, 17),
        (3, "sign", 0, 1),
        (3, "low_rank", 2 * SPAN, 2),
        (3, "sign", SPAN, 17),
    ],
)
def test_hot_spans_on_the_card_and_the_others_on_the_core(
    experts: int, kind: str, hot: int, tokens: int
) -> None:
    rows = [feed_forward("q8", "drelu", seed=seed, neurons=NEURONS) for seed in range(experts)]
    own = predictors(rows, kind)
    x, residual = inputs(tokens), random(tokens, HIDDEN, seed=2).to(DEVICE)
    used = min(2, experts)
    chosen = torch.stack([(torch.arange(tokens) + k) % experts for k in range(used)], 1).int()
    weights = random(tokens, used, seed=5).abs().to(DEVICE) if used > 1 else torch.ones(tokens, 1)
    truth, counted = truth_of(rows, own, x, residual, "predicted", chosen, weights)
    routed = {"chosen": chosen, "weights": weights} if experts > 1 else {}
    layer = split_of(rows, own, hot)
    y, counts = layer.forward(x, residual, mode="predicted", **routed)
    assert relative_rms(y, truth) < SAME_SUM
    assert counts.tolist() == counted.tolist()


def test_the_card_and_the_core_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to have begun."""
    if DEVICE.type == "cuda":
        pytest.skip("a card that is there has a stream of its own")
    layer, both = split_of([feed_forward("q8", "drelu", neurons=NEURONS)], [], 64), []
    meet = threading.Barrier(2)
    for name, whose, method in (("card", layer.hot, "forward"), ("core", layer, "_cold")):
        plain = getattr(whose, method)

        def met(*args: Any, name: str = name, plain: Any = plain, **rest: Any) -> Any:
            meet.wait(LONG)
            both.append(name)
            return plain(*args, **rest)

        monkeypatch.setattr(whose, method, met)
    layer.forward(inputs(1), inputs(1), mode="exact")
    assert sorted(both) == ["card", "core"]


# -- placement -----------------------------------------------------------------------------------


def by_topic(experts: int = 1) -> list[FFNRows]:
    """Neurons of span s are active where input s is positive, and only there."""
    with CPU:
        weights = random(3, NEURONS, HIDDEN, seed=7).abs() / HIDDEN
        weights[:2] = 0.0
        for span in range(SPANS + 1):
            weights[:2, span * SPAN : (span + 1) * SPAN, span] = 1.0
        return [quantise_ffn(weights, ("f16",) * 3)] * experts


def text_of(*spans: int) -> torch.Tensor:
    x = torch.full((1, HIDDEN), -1.0)
    x[:, list(spans)] = 1.0
    return x.to(DEVICE)


class Run:
    """Steps of layers, compared with the reference, and what moves between them."""

    def __init__(self, limit_spans: int, *, experts: int = 1, layers: int = 1, where: Any = None):
        self.rows, self.experts = by_topic(experts), experts
        self.layers = [
            split_of(self.rows, [], 2 * SPAN, where or card(DEVICE)) for _ in range(layers)
        ]
        own = self.layers[0]
        limit = limit_spans * own.span_bytes
        self.placement = hybrid.Placement(self.layers, own.card, limit)
        self.moved: list[int] = []

    def step(self, x: torch.Tensor, mode: ops.Mode = "exact") -> None:
        before = [layer.span_of.copy() for layer in self.layers]
        self.placement.follow()
        now = [layer.span_of for layer in self.layers]
        self.moved.append(sum(int((a != b).sum()) for a, b in zip(before, now, strict=True)))
        chosen = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
        weights = torch.ones(1, 1, device=DEVICE)
        routed = {"chosen": chosen, "weights": weights} if self.experts > 1 else {}
        truth, counted = truth_of(self.rows, [], x, x, mode, chosen, weights)
        for layer in self.layers:
            y, counts = layer.forward(x, x, mode=mode, **routed)
            assert relative_rms(y, truth) < SAME_SUM
            assert counts.tolist() == counted.tolist()

    def on_card(self, layer: int = 0, expert: int = 0) -> set[int]:
        own = self.layers[layer]
        found = set(own.span_of[expert].tolist())
        assert found == set(np.flatnonzero(own.on_card[expert]).tolist())
        return found


def test_the_placement_follows_the_text() -> None:
    """And what is computed stays what it was, at every step."""
    run = Run(1)
    for _ in range(3):
        run.step(text_of(0, 1))
    assert run.on_card() == {0, 1}
    for _ in range(15):
        run.step(text_of(3, 4))
    assert run.on_card() == {3, 4}
    for _ in range(35):
        run.step(text_of(1, 3))
    assert run.on_card() == {1, 3}
    assert max(run.moved) == 1


def test_no_more_is_moved_than_the_limit_allows() -> None:
    """Of four feed-forwards all want to move."""
    run = Run(3, layers=4)
    for _ in range(4):
        run.step(text_of(3, 4))
    assert run.moved[0] == 0
    assert max(run.moved) == 3
    less = Run(0)
    for _ in range(4):
        less.step(text_of(3, 4))
    assert less.on_card() == {0, 1}


def test_spans_of_the_experts_that_are_used_move() -> None:
    run = Run(2, experts=3)
    for _ in range(6):
        run.step(text_of(2, 4))
    assert [run.on_card(expert=expert) for expert in range(3)] == [{2, 4}, {0, 1}, {0, 1}]


def test_little_use_moves_nothing_and_dense_mode_neither() -> None:
    """The short last span fits no place, however hot it is."""
    run = Run(4)
    for _ in range(5):
        run.step(text_of(0, 1, SPANS))
        run.step(text_of(3, 4), mode="dense")
    assert run.on_card() == {0, 1}


def test_a_slow_link_holds_up_no_step() -> None:
    """What is carried arrives only after the next step has been computed, and is used behind it."""
    computed, events = threading.Event(), []

    class Slow(Card):
        def carry(self, arrays: Any) -> Any:
            def after_the_step() -> Any:
                assert computed.wait(LONG)
                events.append(f"arrived: {len(arrays)} arrays")
                return self.give(arrays)

            return self._carrier.submit(after_the_step)

    if DEVICE.type == "cuda":
        pytest.skip("needs the stand-in")
    run = Run(1, where=Slow())
    run.step(text_of(3, 4))
    run.step(text_of(3, 4))  # sends for a span, and computes
    events.append("computed")
    computed.set()
    assert run.on_card() == {0, 1}
    run.step(text_of(3, 4))
    assert events[:2] == ["computed", "arrived: 2 arrays"]
    assert run.moved == [0, 0, 1]


# -- the decoder ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packed(shared: Shared) -> Callable[[str], Path]:
    """Toy models with three whole spans of neurons, hot ones not known."""

    def make(family: str) -> Path:
        wide = partial(make_model, family, intermediate_size=3 * SPAN + 8)
        model = shared(f"wide-{family}", wide)
        own = shared(f"sparse-wide-{family}", partial(convert, str(model), activation="drelu"))
        return shared(
            f"packed-wide-{family}", partial(pack, str(own), quant="q4", predictor="sign")
        )

    return make


@pytest.mark.parametrize(
    ("family", "mode"),
    [("mistral", "exact"), ("mixtral", "dense"), ("mixtral", "exact"), ("mixtral", "predicted")],
)
def test_a_split_model_prints_the_tokens_of_the_reference_while_spans_move(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    monkeypatch.setattr(hybrid, "TIMES", 1.0)
    monkeypatch.setattr(hybrid, "LEAST", 1.0)
    folder, caches = packed(family), 1 << 20
    whole = Engine(folder, backend="gpu", mode=mode, gpu_memory=1 << 30, kv_bytes=caches)
    assert whole.decoder.placement is None
    own = whole.decoder.split
    engine = None
    for memory in range(own.rest + caches, own.rest + caches + (1 << 22), 1 << 12):
        engine = Engine(folder, backend="gpu", mode=mode, gpu_memory=memory, kv_bytes=caches)
        if engine.decoder.split.hot:
            break
    assert f"64 of {3 * SPAN + 8} neurons on it" in engine.describe()
    placement = engine.decoder.placement
    placement.limit = 1 << 20
    before = np.stack([layer.span_of for layer in placement.layers])
    plain = Engine(folder, backend="torch", mode=mode)
    for prompt in (list(range(first, first + 30)) for first in range(20, 60)):
        truth, nearest = greedy(plain, prompt, TOKENS)
        if nearest > CLEAR:
            break
    assert greedy(engine, prompt, TOKENS)[0] == truth
    after = np.stack([layer.span_of for layer in placement.layers])
    assert (before != after).any() == (mode != "dense")


def test_a_split_that_cannot_be_is_refused(packed_mistral: Path) -> None:
    with pytest.raises(TurboSparseError, match=r"--gpu-memory 0.0 MiB is too little for"):
        Engine(packed_mistral, backend="gpu", gpu_memory=1000)
    with pytest.raises(TurboSparseError, match=r"--gpu-memory needs --backend gpu, not cpu"):
        Engine(packed_mistral, backend="cpu", gpu_memory="1GiB")


def test_uses_of_card_and_core_are_those_of_the_neurons() -> None:
    rows = feed_forward("q8", "drelu", neurons=NEURONS)
    layer = split_of([rows], [], 2 * SPAN)
    hybrid.Placement([layer], layer.card, 0)
    x = inputs(2)
    layer.forward(x, x, mode="exact")
    assert layer.hot is not None
    found = np.concatenate((layer.hot.uses.cpu().numpy(), layer.uses[:, 2:]), 1)
    with CPU:
        _, counts = reference.Neurons(rows, "drelu", 1).forward(x.cpu(), x.cpu(), mode="exact")
        each = [
            reference.Neurons(rows[at : at + SPAN], "drelu", 1).forward(
                x.cpu(), x.cpu(), mode="exact"
            )[1][:, 2]
            for at in range(0, NEURONS, SPAN)
        ]
    assert found.tolist() == [[int(one.sum()) for one in each]]
    assert found.sum() == counts[:, 2].sum()
    assert not layer.uses[:, :2].any()
