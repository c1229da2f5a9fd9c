"""Active sets, their unions, and what else is summed up, against sets worked out one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turbosparse.analyse import analyse
from turbosparse.analysis.measure import measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.hf.observe import Seen, observe_ffn, observe_routers
from turbosparse.packed.stats import BATCHES, EDGES, NEAR, WINDOWS, Stats

Make = Callable[..., Path]
Sets = list[list[set[int]]]  # [text][token] → active neurons of a layer, those of experts apart
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ("The small boats and the gulls went home, and so did we.", "Two boats.", "No gull at all.")


@pytest.fixture(scope="module")
def seen_of() -> Callable[[Path], tuple[Any, list[list[int]], list[list[list[Seen]]]]]:
    """seen_of(folder): the model, the ids of `TEXTS`, and [text][layer] what its experts did."""

    def run(folder: Path) -> tuple[Any, list[list[int]], list[list[list[Seen]]]]:
        model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        found = []
        for text in ids:
            layers: list[list[Seen]] = [[] for _ in model.model.layers]
            with torch.no_grad(), observe_ffn(model, lambda s, at=layers: at[s.layer].append(s)):
                model(torch.tensor([text[:-1]]))
            found.append(layers)
        return model, ids, found

    return run


def sets_of(runs: Iterable[Iterable[Seen]], neurons: int, *, near: float | None = None) -> Sets:
    """The active set of every token of every text, from what one layer did."""
    found: Sets = []
    for experts in runs:
        tokens: dict[int, set[int]] = {}
        for seen in experts:
            size = seen.combined.abs()
            least = near * size.amax(-1, keepdim=True) if near else 0.0
            chosen = size >= least if near else size != 0
            for row, entries in zip(seen.rows.tolist(), chosen, strict=True):
                offset = (seen.expert or 0) * neurons
                own = {offset + int(n) for n in entries.nonzero().flatten()}
                tokens[row] = tokens.get(row, set()) | own
        found.append([tokens[row] for row in range(len(tokens))])
    return found


@pytest.mark.parametrize(
    ("family", "activation"),
    [("llama", "drelu"), ("llama", "swiglu"), ("mixtral", "drelu"), ("nemotron", "relu2")],
)
def test_sets_are_counted_as_one_by_one(
    sparse: Make, seen_of: Any, family: str, activation: str
) -> None:
    folder = sparse(family, activation)
    model, ids, runs = seen_of(folder)
    stats = measure(model, load_tokenizer(folder), {"boats": TEXTS})
    near = NEAR[-1] if activation == "swiglu" else None
    neurons = model.config.intermediate_size
    for layer in range(2):
        sets = sets_of((run[layer] for run in runs), neurons, near=near)
        for index, size in enumerate(WINDOWS):
            unions = [
                len(set.union(*text[end - size : end]))
                for text in sets
                for end in range(size, len(text) + 1)
            ]
            assert int(stats.sums["unions"][layer, index]) == sum(unions)
            assert int(stats.sums["windows"][index]) == len(unions)
        pairs = [pair for text in sets for pair in pairwise(text)]
        common = [sum(len(a & b) for a, b in pairs), sum(len(b) for _, b in pairs)]
        assert stats.sums["overlap"][layer].tolist() == common
        assert stats.overlap()[layer] == pytest.approx(common[0] / common[1])
        for place in range(5):
            low, high = (0, 1) if place == 0 else (2 ** (place - 1), 2**place)
            here = [len(own) for text in sets for own in text[low:high]]
            visits = len(here) * (2 if family == "mixtral" else 1)
            assert stats.sums["positions"][layer, place].tolist() == [sum(here), visits]
        # the batch has the longest text first; tokens that stand half the batch apart are paired
        order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
        fold = [own for text in order for own in sets[text]]
        for index in range(len(BATCHES)):
            half = len(fold) // 2
            fold = [a | b for a, b in zip(fold[:half], fold[half : 2 * half], strict=True)]
            assert int(stats.sums["batches"][layer, index]) == sum(map(len, fold))
            assert int(stats.sums["draws"][index]) == len(fold)
        in_use = neurons * (2 if family == "mixtral" else 1)
        expected = [len(own) / in_use for own in sets[order[0]]]
        assert stats.sample[layer].tolist() == pytest.approx(expected)
    whole = load_tokenizer(folder).decode(ids[order[0]][:-1])
    assert "".join(stats.words) == whole


@pytest.mark.parametrize(
    ("family", "activation"), [("qwen2", "reglu"), ("mixtral", "swiglu"), ("mistral", "relu")]
)
def test_values_are_counted_as_one_by_one(
    sparse: Make, seen_of: Any, family: str, activation: str
) -> None:
    folder = sparse(family, activation)
    model, _, runs = seen_of(folder)
    stats = measure(model, load_tokenizer(folder), {"boats": TEXTS})
    layers, experts, neurons = stats.active.shape
    expected = Stats.empty(model.config)
    edges = torch.tensor(EDGES)
    for layer, expert in [(a, b) for a in range(layers) for b in range(experts)]:
        mine = [s for run in runs for s in run[layer] if (s.expert or 0) == expert]
        gate, up, combined = (torch.cat([s[part] for s in mine]) for part in (2, 3, 4))
        at, sums = (layer, expert), expected.sums
        sums["signs"][at] = torch.stack([(up > 0).sum(), ((gate > 0) & (up > 0)).sum()])
        sums["mass"][at] = combined.square().sum(0)
        if activation == "swiglu":
            size = combined.abs()
            below = [(size < part * size.amax(-1, keepdim=True)).sum() for part in NEAR]
            sums["near"][layer] += torch.stack(below)
        else:
            shares = (combined != 0).sum(-1) * 100 // neurons
            sums["shares"][at] = shares.bincount(minlength=101)
        for row, values in enumerate((gate, up, combined)):
            some = values[:, ::2].flatten()  # 96 neurons: every second is 48, not above 64
            bins = (some[:, None] > edges).sum(-1).bincount(minlength=len(EDGES) + 1)
            sums["values"][layer, row] += bins
    for name in ("signs", "values", "near", *([] if activation == "swiglu" else ["shares"])):
        assert torch.equal(stats.sums[name], expected.sums[name]), name
    torch.testing.assert_close(stats.sums["mass"], expected.sums["mass"], rtol=1e-5, atol=1e-9)
    zeros = stats.sums["values"][:, 2, EDGES.index(0.0)].sum() / stats.sums["values"][:, 2].sum()
    assert zeros == 0 if activation == "swiglu" else 0.3 < zeros < 0.7


def test_quantiles_are_of_the_tokens(sparse: Make) -> None:
    stats = Stats.empty(load_model(sparse("llama")).config)
    stats.sums["shares"][0, 0, [10, 20, 60]] = torch.tensor([1, 8, 1])
    assert stats.quantiles(0.1, 0.5, 0.9, 0.95)[0, 0].tolist() == pytest.approx(
        [0.1, 0.2, 0.2, 0.6]
    )


def test_the_entropy_of_a_router_is_that_of_its_shares(sparse: Make) -> None:
    folder = sparse("mixtral")
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    logits: list[list[Tensor]] = [[], []]
    with observe_routers(model, lambda layer, given, _: logits[layer].append(given)):
        for text in TEXTS:
            model(torch.tensor([tokenizer(text)["input_ids"][:-1]]))
    stats = measure(model, tokenizer, {"boats": TEXTS})
    for layer in range(2):
        shares = torch.cat(logits[layer]).double().softmax(-1)
        entropy = -(shares * shares.log()).sum(-1).mean()
        assert stats.router_entropy()[layer] == pytest.approx(float(entropy), rel=1e-4)
        assert 0 < float(entropy) < math.log(4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_runs_add_up_to_the_whole(
    sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    """Two texts, two runs: the files added up say what one run on both says."""
    texts = [tmp_path / name for name in ("one.txt", "two.txt")]
    for path, text in zip(texts, TEXTS, strict=False):
        path.write_text(text)
    texts.append(corpus)
    run = partial(analyse, str(sparse(family)), max_tokens=300)
    whole = run(data=texts, out=tmp_path / "whole")
    run(data=texts[:1], out=tmp_path / "first")
    run(data=texts[1:2], out=tmp_path / "second")
    files = [tmp_path / name / "stats.turbosparse" for name in ("first", "second")]
    merged = analyse(str(sparse(family)), add=files, out=tmp_path / "two")
    assert merged.tokens < whole.tokens
    added = run(data=[corpus], add=[tmp_path / "two" / "stats.turbosparse"], out=tmp_path / "three")
    one, three = (Stats.load(tmp_path / n / "stats.turbosparse") for n in ("whole", "three"))
    for name, tensor in one._tensors().items():
        torch.testing.assert_close(three._tensors()[name], tensor, rtol=1e-5, atol=1e-9)
    assert three.corpora.keys() == one.corpora.keys()
    assert all(torch.equal(three.corpora[name], counts) for name, counts in one.corpora.items())
    assert added.sparsity_of == pytest.approx(whole.sparsity_of)
    assert added.perplexity == pytest.approx(whole.perplexity)
    assert added.window_share == pytest.approx(whole.window_share)


def test_statistics_of_other_models_do_not_add_up(sparse: Make, tmp_path: Path) -> None:
    config = load_model(sparse("mixtral")).config
    Stats.empty(config).save(tmp_path / "moe")
    with pytest.raises(TurboSparseError, match=r"do not add up: active is \[2, 1, 96\]"):
        analyse(str(sparse("llama")), add=[tmp_path / "moe"], out=tmp_path)
    Stats.empty(load_model(sparse("llama", "reglu")).config).save(tmp_path / "reglu")
    with pytest.raises(TurboSparseError, match="run as drelu and as reglu do not add up"):
        analyse(str(sparse("llama")), add=[tmp_path / "reglu"], out=tmp_path)


def test_a_sample_of_half_a_letter_has_a_word_for_each_token(sparse: Make) -> None:
    model, tokenizer = load_model(sparse("llama")), load_tokenizer(sparse("llama"))
    stats = measure(model, tokenizer, {"one": ["naïve — ☃ <b>"]})
    assert len(stats.words) == stats.sample.shape[1] == stats.predicted["one"]
