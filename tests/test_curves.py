"""Perplexity against kept neurons, against the same worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turbosparse.analyse import analyse
from turbosparse.analysis.curves import NEAR, _Choices, bisect, cett, curves_of
from turbosparse.analysis.measure import batches, measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.change import change_each, force_sparsity
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.hf.observe import Seen, observe_ffn
from turbosparse.packed.stats import Stats

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def written_by(model: Any, length: int = 48, texts: int = 4) -> list[list[int]]:
    """Token ids drawn from the model itself, whose perplexity only grows without some neurons."""
    torch.manual_seed(0)
    ids = torch.zeros(texts, 1, dtype=torch.int64)
    for _ in range(length):
        shares = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, shares.multinomial(1)], 1)
    return ids.tolist()  # type: ignore[no-any-return]


def test_cett_is_what_the_dropped_neurons_add() -> None:
    torch.manual_seed(0)
    combined, down = torch.randn(3, 5).double().relu(), torch.randn(4, 5).double()
    levels = torch.tensor([0.0, 0.5, 1.0, 2.0, 99.0]).double()
    found = cett(combined, down, levels)
    for token in range(3):
        outputs = [combined[token, i] * down[:, i] for i in range(5)]
        whole = torch.stack(outputs).sum(0).norm()
        for index, level in enumerate(levels):
            dropped = [n for n in outputs if n.norm() < level]
            lost = torch.stack(dropped).sum(0).norm() if dropped else torch.tensor(0.0)
            assert float(found[token, index]) == pytest.approx(float(lost / whole))
    assert found[:, 0].tolist() == [0, 0, 0]
    assert found[:, -1].tolist() == pytest.approx([1, 1, 1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layer_has_the_cett_that_was_asked_for(sparse: Make, family: str) -> None:
    model = load_model(sparse(family, "swiglu")).eval()
    ids = torch.tensor(written_by(model, texts=1))
    _, keep = _Choices(model, ids).cett(0.2)
    seen: list[Seen] = []
    with observe_ffn(model, seen.append):
        model(ids[:, :-1])
    for layer, block in enumerate(model.model.layers):
        ratios = []
        for one in (s for s in seen if s.layer == layer):
            weight = (
                block.mlp.down_proj.weight
                if one.expert is None
                else block.mlp.experts.down_proj[one.expert]
            )
            dropped = one.combined * ~keep((layer, one.expert), one.combined)
            lost, whole = ((x @ weight.T).norm(dim=-1) for x in (dropped, one.combined))
            ratios.append(lost / whole)
        assert float(torch.cat(ratios).mean()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("family", ["mistral", "nemotron", "mixtral"])
def test_what_is_changed_is_what_the_down_projection_reads(sparse: Make, family: str) -> None:
    model = load_model(sparse(family)).eval()
    ids = torch.tensor(written_by(model, texts=2))
    with torch.no_grad():
        plain = model(ids).logits
        with change_each(model, lambda _where, active, _rows: active):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
        seen: list[tuple[int, int | None]] = []

        def only_last(where: tuple[int, int | None], active: Any, rows: Any) -> Any:
            seen.append(where)
            assert len(rows) == len(active)
            return active * (where[0] == 1)

        with change_each(model, only_last):
            changed = model(ids).logits
        assert torch.equal(model(ids).logits, plain), "nothing is left behind"
        mlp = model.model.layers[0].mlp
        (mlp.experts.down_proj if family == "mixtral" else mlp.down_proj.weight).zero_()
        torch.testing.assert_close(changed, model(ids).logits, rtol=1e-4, atol=1e-4)
    experts = range(4) if family == "mixtral" else [None]
    assert set(seen) == {(layer, expert) for layer in range(2) for expert in experts}


def test_a_curve_is_what_the_model_does_with_so_many_neurons(sparse: Make) -> None:
    model, tokenizer = load_model(sparse("llama", "swiglu")).eval(), load_tokenizer(sparse("llama"))
    text = "The small boats and the gulls went home, and so did we."
    pieces = [tokenizer(text)["input_ids"]]
    curves = curves_of(model, pieces)
    plain = measure(model, tokenizer, {"one": [text]})
    assert curves.tokens == plain.predicted["one"]
    assert curves.kept == 1
    assert curves.perplexity == pytest.approx(plain.perplexity(), rel=1e-5)
    for point in curves.methods["top_k"]:
        with force_sparsity(model, 1 - point.setting):
            forced = measure(model, tokenizer, {"one": [text]})
        assert point.perplexity == pytest.approx(forced.perplexity(), rel=1e-5)
        assert point.kept == pytest.approx(1 - forced.activation_sparsity(), abs=1e-6)
    for name, points in curves.methods.items():
        kept = [point.kept for point in points]
        assert kept == sorted(kept, reverse=True), name
    asked, found = curves.methods["threshold"][1].kept, 0.5
    assert asked == pytest.approx(found, abs=0.05)


@pytest.mark.parametrize(("family", "activation"), [("llama", "drelu"), ("mixtral", "reglu")])
def test_cut_gates_are_the_threshold_of_the_config(
    sparse: Make, tmp_path: Path, family: str, activation: str
) -> None:
    folder = sparse(family, activation)
    model = load_model(folder).eval()
    pieces = written_by(model, texts=2)
    curves = curves_of(model, pieces)
    point = curves.methods["gate"][2]
    assert point.kept < curves.kept
    assert curves_of(model, pieces) == curves, "nothing is left behind"
    shutil.copytree(folder, tmp_path / "cut")
    config = json.loads((tmp_path / "cut/config.json").read_text())
    config |= {"ffn_threshold": point.setting}
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    cut = curves_of(load_model(tmp_path / "cut").eval(), pieces)
    assert cut.kept == point.kept
    assert cut.perplexity == pytest.approx(point.perplexity, rel=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_without_a_positive_gate_have_curves(sparse: Make, layers: int) -> None:
    """One that is dead, and a model of nothing else."""
    model = load_model(sparse("llama")).eval()
    pieces = written_by(model, texts=1)
    with torch.no_grad():
        for block in model.model.layers[:layers]:
            block.mlp.gate_proj.weight.zero_()
    curves = curves_of(model, pieces)
    assert (curves.kept == 0) == (layers == 2)
    assert all(points[-1].kept <= curves.kept for points in curves.methods.values())


def test_padding_counts_for_nothing(sparse: Make) -> None:
    model = load_model(sparse("mixtral")).eval()
    long, short = written_by(model, texts=2)
    assert len(batches([long, short[:9]])) == 1
    both = curves_of(model, [long, short[:9]])
    alone = [curves_of(model, [piece]) for piece in (long, short[:9])]
    tokens = [one.tokens for one in alone]
    mean = sum(n * one.kept for n, one in zip(tokens, alone, strict=True)) / sum(tokens)
    assert both.kept == pytest.approx(mean, rel=1e-3)


def test_bisection_converges() -> None:
    asked: list[float] = []

    def cube(x: float) -> float:
        asked.append(x)
        return x**3

    at = bisect(cube, 0.01, low=0.0, high=0.5)
    assert at == asked[-1]
    assert at == pytest.approx(0.01 ** (1 / 3), rel=NEAR)
    assert bisect(cube, 0.5, low=0.2, high=None) == pytest.approx(0.5 ** (1 / 3), rel=NEAR)
    assert bisect(cube, 2.0, low=0.2, high=None) is None


@pytest.mark.parametrize("rise", [1.0, 10.0])
def test_perplexity_rises_by_what_was_allowed(sparse: Make, rise: float) -> None:
    model = load_model(sparse("llama", "swiglu")).eval()
    curves = curves_of(model, written_by(model), rise=rise)
    assert curves.cett
    risen = curves.cett.perplexity / curves.perplexity - 1
    assert risen == pytest.approx(rise / 100, rel=NEAR * 1.01)
    assert curves.cett in curves.methods["cett"]
    assert 0 < curves.cett.kept < 1


def test_curves_are_kept_in_the_statistics(sparse: Make, corpus: Path, tmp_path: Path) -> None:
    found = analyse(
        str(sparse("llama")), data=[corpus], out=tmp_path, last=2, max_tokens=60, curves=60
    )
    stats = Stats.load(tmp_path / "stats.turbosparse")
    assert stats.curves
    assert found.curves == stats.curves.model_dump()
    assert [len(points) >= 6 for points in stats.curves.methods.values()] == [True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"curves": 0}, "--curves is 0; give at least 1"), ({"rise": 0}, "--rise is 0; give a perc")],
)
def test_curves_of_nothing_are_refused(
    sparse: Make, corpus: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        analyse(str(sparse("llama")), data=[corpus], **options)


def test_curves_of_packed_and_of_larger_models_are_refused(
    packed_mistral: Path, sparse: Make, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(TurboSparseError, match="--curves need a folder with plain weights"):
        analyse(str(packed_mistral), data=[corpus], curves=10)
    monkeypatch.setattr("turbosparse.analyse.memory_available", lambda: 1000)
    with pytest.raises(TurboSparseError, match="it has to fit in memory"):
        analyse(str(sparse("llama")), data=[corpus], out=tmp_path, curves=10)
