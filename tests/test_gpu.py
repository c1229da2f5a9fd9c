"""The Triton kernels against the reference, and the decoder on them against the other backends.

Without a card all of it runs in Triton's interpreter. What is small here is so because of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from conftest import Shared
from greedy import CLEAR
from torch.nn.functional import scaled_dot_product_attention

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.engine.model import Norm, Rotation
from turbosparse.engine.sequence import Cancelled
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.ops import gpu, gpu_attention, reference
from turbosparse.ops.gpu_attention import Where
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.quant import dequantise, quantise, quantise_ffn, signs
from turbosparse.ops.rows import FFNRows
from turbosparse.pack import pack

interpreter.make_fast()
SAME_SUM = 2e-5  # relative RMS of float32 sums in another order
SAME_HALVES = 1e-3  # of what was rounded to halves
TOKENS = 3
HIDDEN, NEURONS = 96, 70  # more than one segment, and not whole ones
DEVICE = gpu.device()


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """New memory holds NaN, or numbers that no neuron and no count has.

    Kernels meet tensors of the device; models are made where they always are.
    """
    empty, empty_like = torch.empty, torch.empty_like

    def spoilt(of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **settings: Any) -> torch.Tensor:
            new = of(*args, **settings)
            return new.fill_(torch.nan if new.is_floating_point() else 1 << 30)

        return make

    monkeypatch.setattr(torch, "empty", spoilt(empty))
    monkeypatch.setattr(torch, "empty_like", spoilt(empty_like))
    with nullcontext() if "shared" in request.fixturenames else DEVICE:
        yield


@pytest.fixture
def as_on_a_card() -> Iterator[None]:
    before = gpu.ROWS, gpu.DOWN_ROWS, gpu_attention.SPLITS
    interpreter.set_sizes(*interpreter.AS_ON_A_CARD)
    yield
    interpreter.set_sizes(*before)


CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.cpu() - truth.cpu()).norm() / truth.norm().clamp(min=1e-30))


def feed_forward(
    quant: str, activation: str, lean: float = 0.0, seed: int = 0, neurons: int = NEURONS
) -> FFNRows:
    """Rows whose gates, or ups, are the smaller the larger `lean` is, at inputs of `inputs`."""
    parts = ACTIVATIONS[activation].parts
    weights = random(len(parts), neurons, HIDDEN, seed=seed) / HIDDEN**0.5
    weights[0, :, 0] -= lean
    with CPU:
        return quantise_ffn(weights, (quant,) * len(parts))


def inputs(tokens: int) -> torch.Tensor:
    x = random(tokens, HIDDEN, seed=1)
    x[:, 0] = 1.0
    return x.to(DEVICE)


def compare(rows: FFNRows, activation: str, mode: ops.Mode, tokens: int = 2, **rest: Any) -> float:
    """The share of active neurons, of what both agree on."""
    x, residual = inputs(tokens), random(tokens, HIDDEN, seed=2).to(DEVICE)
    with CPU:
        expected, used = reference.Neurons(rows, activation, 1, **rest).forward(
            x.cpu(), residual.cpu(), mode=mode
        )
    y, counts = gpu.Neurons(rows, activation, 1, **rest).forward(x, residual, mode=mode)
    assert relative_rms(y, expected) < SAME_SUM
    assert counts.tolist() == used.tolist()
    return float(used[:, 2].float().mean()) / NEURONS


# -- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "rows", "cols", "tokens"),
    [
        ("f16", 7, 63, 2),
        ("f16", 1, 1023, 1),
        ("q8", 63, 544, 16),
        ("q4", 129, 512, 1),
        ("q4", 1, 32, 3),
        ("q4_0", 7, 1120, 17),
        ("f32", 5, 100, 2),
    ],
)
def test_matrix(quant: str, rows: int, cols: int, tokens: int) -> None:
    weight, bias = random(rows, cols), random(rows, seed=3).to(DEVICE)
    packed = weight.view(torch.uint8)
    if quant != "f32":
        with CPU:
            packed = quantise(weight, quant)
            weight = dequantise(packed, quant, cols)
    matrix, x = gpu.Matrix(packed.numpy(), cols, quant), random(tokens, cols, seed=4)
    expected = (x.double() @ weight.double().T).float() + bias.cpu()
    assert relative_rms(matrix.matmul(x.to(DEVICE), bias), expected) < SAME_SUM
    assert torch.equal(matrix.rows([rows - 1, 0]).cpu(), weight[[rows - 1, 0]])


@pytest.mark.parametrize("quant", ["f16", "q8", "q4_0"])
@pytest.mark.usefixtures("as_on_a_card")
def test_feed_forward_of_every_quantisation(quant: str) -> None:
    rows = feed_forward(quant, "drelu", lean=0.5)
    assert 0 < compare(rows, "drelu", "exact") < 0.3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_of_every_activation(activation: str) -> None:
    rows = feed_forward("q4", activation)
    threshold = 0.3 if ACTIVATIONS[activation].cuts else 0.0
    for mode in ("dense",) if activation in WITHOUT_ZEROS else ("dense", "exact"):
        compare(rows, activation, mode, threshold=threshold)


@pytest.mark.parametrize(("lean", "active"), [(-9.0, 1.0), (9.0, 0.0)])
def test_all_neurons_active_and_none(lean: float, active: float) -> None:
    """Without a gate, so that all can be."""
    assert compare(feed_forward("q8", "relu2", lean), "relu2", "exact", tokens=1) == active


@pytest.mark.parametrize("only", [0, 63, NEURONS - 1])
def test_one_active_neuron(only: int) -> None:
    with CPU:
        weights = torch.full((3, NEURONS, HIDDEN), -1.0)
        weights[:, only] = 1.0
        rows = quantise_ffn(weights, ("f16",) * 3)
    x = torch.ones(1, HIDDEN)
    y, counts = gpu.Neurons(rows, "drelu").forward(x, x, mode="exact")
    assert y.tolist() == [[float(HIDDEN) ** 2] * HIDDEN]
    assert counts.tolist() == [[NEURONS, 1, 1]]


def predictors(rows: list[FFNRows], kind: str) -> list[PackedPredictor]:
    """Of experts, each with a threshold of its own."""
    with CPU:
        return [_predictor(own, kind, number) for number, own in enumerate(rows)]


def _predictor(rows: FFNRows, kind: str, number: int) -> PackedPredictor:
    if kind == "sign":
        about = Predictor(kind="sign", input="post_norm", threshold=0.05 * number)
        return PackedPredictor(about, {"signs": signs(rows, 2)})
    shapes = {"fc1": (32, HIDDEN), "fc2": (len(rows.gates), 32)}
    parts = {
        name: quantise(random(*shape, seed=number), "q4").numpy() for name, shape in shapes.items()
    }
    about = Predictor(
        kind="low_rank", input="pre_norm", threshold=-0.1 * number, quant="q4", ranks=[[32] * 3]
    )
    return PackedPredictor(about, parts)


@pytest.mark.parametrize("kind", ["sign", "low_rank"])
def test_candidates(kind: str) -> None:
    rows = feed_forward("q4", "drelu")
    (predictor,) = predictors([rows], kind)
    assert 0 < compare(rows, "drelu", "predicted", predictor=predictor) < 1


@pytest.mark.parametrize(("tokens", "kind"), [(2, "sign"), (2, "low_rank"), (17, "sign")])
def test_experts_are_those_of_their_tokens(tokens: int, kind: str) -> None:
    """Of a short and of a long pass."""
    rows = [feed_forward("q8", "drelu", seed=expert) for expert in range(3)]
    x, residual = inputs(tokens), random(tokens, HIDDEN, seed=2).to(DEVICE)
    chosen = torch.stack((torch.arange(tokens) % 3, (torch.arange(tokens) + 1) % 3), 1)
    weights = random(tokens, 2, seed=5).abs().to(DEVICE)
    own = predictors(rows, kind)
    y, counts = gpu.Experts(rows, "drelu", own).forward(
        x, residual, mode="predicted", chosen=chosen.int(), weights=weights
    )
    truth, used = torch.zeros(tokens, HIDDEN, device="cpu"), torch.zeros(tokens, 3, device="cpu")
    for expert, predictor in enumerate(own):
        with CPU:
            neurons = reference.Neurons(rows[expert], "drelu", 1, predictor)
            z, count = neurons.forward(x.cpu(), residual.cpu(), mode="predicted")
        here = (chosen == expert).cpu()
        truth += z * (weights.cpu() * here).sum(1, keepdim=True)
        used += count * here.sum(1, keepdim=True)
    assert relative_rms(y, truth) < SAME_SUM
    assert counts.tolist() == used.tolist()


def test_a_token_is_the_same_in_any_company() -> None:
    """To the last bit."""
    rows = feed_forward("q4", "drelu")
    (predictor,) = predictors([rows], "low_rank")
    neurons, x = gpu.Neurons(rows, "drelu", 1, predictor), inputs(3)
    with CPU:
        packed = quantise(random(5, HIDDEN), "q4").numpy()
    matrix = gpu.Matrix(packed, HIDDEN, "q4")
    together, _ = neurons.forward(x, x, mode="predicted")
    alone = [neurons.forward(one, one, mode="predicted")[0] for one in x.split(1)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(matrix.matmul(x), torch.cat([matrix.matmul(one) for one in x.split(1)]))


def test_predictors_of_other_ranks_are_refused() -> None:
    rows = [feed_forward("q8", "drelu")] * 2
    one, other = predictors(rows, "low_rank")
    other.tensors["fc1"] = other.tensors["fc1"][:16]
    with pytest.raises(TurboSparseError, match=r"have ranks \[16, 32\]; .* use --mode exact"):
        gpu.Experts(rows, "drelu", [one, other])


def test_norms() -> None:
    x, weight, bias = (random(*shape).to(DEVICE) for shape in ((3, HIDDEN), (HIDDEN,), (HIDDEN,)))
    for own in (None, bias):
        expected = Norm(weight, own, 1e-5)(x)
        assert relative_rms(gpu_attention.norm(x, weight, own, 1e-5), expected) < SAME_SUM


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.usefixtures("as_on_a_card")
def test_attention_over_caches(window: int | None) -> None:
    """Two tokens of one text and one of another; more positions than a program reads at a time."""
    kv, heads, head, turned, layer = 1, 3, 24, 12, 1
    caches = [random(2, 2, kv, context, head).half().to(DEVICE) for context in (50, 300)]
    own, positions = [0, 0, 1], [40, 41, 250]
    where = Where(
        torch.tensor([caches[i].data_ptr() for i in own]),
        torch.tensor([caches[i].shape[3] for i in own]),
        torch.tensor(positions),
    )
    q, k, v = (random(3, n * head, seed=n).to(DEVICE) for n in (heads, kv, kv))
    angles = random(3, turned // 2).repeat(1, 2).to(DEVICE)
    turn = Rotation(angles.cos(), angles.sin())
    queries, keys = (
        turn(y.unflatten(1, (-1, head)).transpose(0, 1)).transpose(0, 1).flatten(1) for y in (q, k)
    )
    q = gpu_attention.keep(q, k, v, turn.cos, turn.sin, where, layer, head)
    assert relative_rms(q, queries) < SAME_SUM
    seen = gpu_attention.attend(q, where, layer, head, kv, window)
    for token, (index, position) in enumerate(zip(own, positions, strict=True)):
        store = caches[index][layer, :, 0].float()
        assert relative_rms(store[0, position], keys[token]) < SAME_HALVES
        assert relative_rms(store[1, position], v[token]) < SAME_HALVES
        first = max(0, position - window + 1) if window else 0
        past = store[:, None, None, first : position + 1]
        query = queries[token].view(1, heads, 1, head)
        expected = scaled_dot_product_attention(query, *past, enable_gqa=True)
        assert relative_rms(seen[token], expected.flatten()) < SAME_SUM


# -- the decoder ---------------------------------------------------------------------------------


def greedy(engine: Engine, prompt: list[int], count: int = TOKENS) -> tuple[list[int], float]:
    """A text, and the least distance of a choice to the next best."""
    sequence, nearest = engine.sequence(prompt), float("inf")
    for _ in range(count):
        logits = torch.tensor(engine.step([sequence])[0].logits, device="cpu")
        first, second = logits.topk(2).values.tolist()
        nearest = min(nearest, first - second)
        sequence.extend([int(logits.argmax())])
    return sequence.tokens[-count:], nearest


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("mistral", "dense"),  # a sliding window
        ("mistral", "predicted"),
        ("llama", "exact"),  # biases, a tied head
        ("nemotron", "exact"),  # no gate, LayerNorm, half of each head turns
        ("mixtral", "exact"),
        ("mixtral", "predicted"),
    ],
)
def test_the_tokens_are_those_of_the_core(
    sparse: Callable[[str], Path], shared: Shared, family: str, mode: str
) -> None:
    """The prompt in a long pass, then tokens by kernels alone."""
    folder = shared(
        f"gpu-{family}", partial(pack, str(sparse(family)), quant="q4", predictor="sign")
    )
    core, engine = (Engine(folder, backend=backend, mode=mode) for backend in ("cpu", "gpu"))
    for prompt in (list(range(first, first + 30)) for first in range(20, 60)):
        truth, nearest = greedy(core, prompt)
        if nearest > CLEAR:
            break
    assert greedy(engine, prompt)[0] == truth
    assert "backend gpu (" in engine.describe()


def test_sequences_of_a_step_do_not_see_each_other(packed_mistral: Path) -> None:
    """To the last bit: one that reads two tokens, and one that reads one."""
    decoder = Engine(packed_mistral, backend="gpu").decoder
    caches = [decoder.new_cache(40), decoder.new_cache(30)]
    together, used = decoder.step([[5, 6], [8]], caches, mode="exact", every=True)
    assert [cache.length for cache in caches] == [2, 1]
    for tokens, row in (([5, 6], 1), ([8], 2)):
        alone, own = decoder.step([tokens], [decoder.new_cache(50)], mode="exact")
        assert (together[row] == alone[0]).all()
        assert (used[:, row] == own[:, -1]).all()


def test_a_step_of_few_tokens_can_be_cancelled_before_it(packed_mistral: Path) -> None:
    decoder = Engine(packed_mistral, backend="gpu").decoder
    cancel, cache = decoder.new_cancel(), decoder.new_cache(40)
    cancel.set()
    with pytest.raises(Cancelled):
        decoder.step([[5]], [cache], mode="exact", cancel=cancel)
    assert cache.length == 0


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a card")
def test_without_a_card_it_says_what_to_do(
    packed_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.triton.knobs.runtime, "interpret", False)
    with pytest.raises(TurboSparseError, match=r"needs an NVIDIA GPU, .*, or use --backend cpu"):
        Engine(packed_mistral, backend="gpu")
