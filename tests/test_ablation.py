"""The ablation runner on tiny sizes: the figures that must hold, and that it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Shared

from turbosparse.hf.load import load_model
from turbosparse.training.readers import documents

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = [
    "the",
    "small",
    "boats",
    "and",
    "some",
    "gulls",
    "went",
    "home",
    "over",
    "a",
    "calm",
    "sea",
    "where",
    "two",
    "old",
    "men",
    "sang",
]


@pytest.fixture(scope="module")
def ablation() -> Any:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(BENCHMARKS)
    yield __import__("ablation")
    patch.undo()


def write_data(folder: Path) -> None:
    """Two domains: a file of rows, and a text file that does not say where documents end."""
    import random

    rng = random.Random(0)
    for domain in ("rows", "lines"):
        (folder / domain).mkdir(parents=True)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=12)) + "."

    texts = [" ".join(sentence() for _ in range(3)) for _ in range(300)]
    rows = [{"question": text, "answer": sentence()} for text in [*texts, *texts[:20]]]
    (folder / "rows" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows" / "odd.jsonl").write_text('{"number": 1}\n')
    (folder / "lines" / "a.txt").write_text("\n".join(texts[100:] + texts[:100]))


@pytest.fixture(scope="module")
def data(shared: Shared) -> Path:
    return shared("ablation-data", write_data)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--tokens", "8192", "--extra-tokens", "4096", "--held-out-tokens", "300"]
    given = ["--quick", "--data", str(data), "--out", str(out), "--activations", "swiglu,drelu"]
    return [*given, *sizes, *more]


@pytest.fixture(scope="module")
def made(ablation: Any, data: Path, shared: Shared) -> Path:
    torch.set_num_threads(1)
    return shared("ablation", lambda out: ablation.main(arguments(data, out)))


def result_of(out: Path) -> dict[str, Any]:
    result = json.loads((out / "result.json").read_text())
    return result | {"by_name": {f"{r['road']}-{r['label']}": r for r in result["runs"]}}


def test_the_numbers_that_must_hold(made: Path) -> None:
    result = result_of(made)
    runs = result["by_name"]
    assert list(runs) == ["scratch-swiglu", "scratch-drelu", "continued-swiglu", "continued-drelu"]
    for name, run in runs.items():
        assert set(run["perplexity"]) == {"all", "rows", "lines"}
        low, high = (0, 0) if "swiglu" in name else (0.4, 0.95)
        assert low <= run["activation_sparsity"] <= high
        assert 0.2 < run["gate_positive"] < 0.8
        assert run["training_loss"] < run["log"][0]["loss"]
        assert run["trained"]["tokens"] == (8192 if run["road"] == "scratch" else 4096)
        forced = run["forced"]
        assert [row["share"] for row in forced] == [0, 0.5, 0.8, 0.85, 0.9]
        assert forced[0]["perplexity"] == run["perplexity"], "nothing is taken away"
        assert forced[0]["zeros"] == run["activation_sparsity"]
        assert forced[-1]["zeros"] >= 0.89
        # of a toy that has learnt this little, not always for the worse
        assert forced[-1]["perplexity"]["all"] != forced[0]["perplexity"]["all"]
        zeros = [row["zeros"] for row in forced]
        assert zeros == sorted(zeros)
    base, control = runs["scratch-swiglu"], runs["continued-swiglu"]
    assert control["after_surgery"] == base["perplexity"], "swiglu: no surgery"
    assert runs["continued-drelu"]["after_surgery"]["all"] > base["perplexity"]["all"]
    assert result["settings"]["seed"] == 0
    assert result["machine"]["torch"] == torch.__version__


def test_every_activation_starts_from_the_base_and_sees_the_same_tokens(made: Path) -> None:
    """The first loss is what the model, as converted, pays for the first batch of the stream."""
    from turbosparse.hf.load import load_tokenizer
    from turbosparse.training.mixture import Mixture, training_stream

    runs = result_of(made)["by_name"]
    recipes = [json.loads((made / name / "recipe.json").read_text()) for name in runs]
    for recipe in recipes[2:]:
        assert {k: v for k, v in recipe.items() if k != "model"} == {
            k: v for k, v in recipes[2].items() if k != "model"
        }
    mixture = Mixture.model_validate(recipes[2]["data"])
    tokenizer = load_tokenizer(made / "tokenizer")
    stream = training_stream(mixture, tokenizer, root=made / "corpus", seed=0)
    rows = [row["input_ids"] for row, _ in zip(stream, range(8), strict=False)]
    ids = torch.tensor(rows)
    for activation in ("swiglu", "drelu"):
        model = load_model(made / "scratch-swiglu", activation=activation)
        with torch.no_grad():
            expected = float(model(ids, labels=ids).loss)
        assert runs[f"continued-{activation}"]["first_loss"] == pytest.approx(expected, rel=1e-4)


def test_held_out_documents_are_in_no_training_part(made: Path) -> None:
    for domain in ("rows", "lines"):
        folder = made / "corpus" / domain
        base, extra, held_out = (
            list(documents(folder / f"{part}.jsonl")) for part in ("base", "extra", "held_out")
        )
        assert min(map(len, (base, extra, held_out))) >= 1
        every = base + extra + held_out
        assert len(set(every)) == len(every), "no text stands twice"


def test_finished_runs_are_not_trained_again(
    ablation: Any,
    data: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    made = shutil.copytree(made, tmp_path / "out")
    before = result_of(made)
    trained: list[str] = []
    run_recipe = ablation.run_recipe

    def counted(recipe: Any, *, out: Path, root: Path) -> Any:
        trained.append(out.name)
        return run_recipe(recipe, out=out, root=root)

    monkeypatch.setattr(ablation, "run_recipe", counted)
    ablation.main(arguments(data, made))
    assert not trained
    assert result_of(made)["runs"] == before["runs"]
    more = ["--variants", "l1=3", "widen=2,l1=1", "--scratch", "none", "--wide-control", "1.5"]
    ablation.main(arguments(data, made, *more))
    new = ["drelu+l1=3", "drelu+widen=2+l1=1", "swiglu+widen=1.5"]
    assert trained == [f"continued-{label}" for label in new]
    printed = capsys.readouterr().out
    assert all(f"| {label} |" in printed for label in ["swiglu", "drelu", *new])
    assert "Perplexity at forced sparsity" in printed
    runs = result_of(made)["by_name"]
    plain, wide = (runs[f"continued-{label}"] for label in ("drelu", new[1]))
    assert wide["after_surgery"]["all"] < plain["after_surgery"]["all"], "it was calibrated"
    sizes = [load_model(made / f"continued-{label}").config.intermediate_size for label in new]
    assert sizes == [64, 128, 96]
    base, control = runs["scratch-swiglu"]["perplexity"], runs[f"continued-{new[2]}"]
    assert control["after_surgery"] == pytest.approx(base), "its new neurons add nothing yet"
    assert control["perplexity"] != runs["continued-swiglu"]["perplexity"]
    with pytest.raises(SystemExit, match=r"other settings \(tokens\)"):
        ablation.main(arguments(data, made, "--tokens", "4096"))


def test_the_curves_are_drawn(made: Path) -> None:
    assert (made / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("ablation")  # which lets benchmarks be imported
def test_a_series_puts_seeds_together(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second run is the first, but of another seed and with twice dReLU's perplexity."""
    series, other = __import__("series"), shutil.copytree(made, tmp_path / "other")
    result = json.loads((made / "result.json").read_text())
    runs = {(run["road"], run["label"]): run for run in result["runs"]}
    drelu = runs["continued", "drelu"]["perplexity"]["all"]
    ratio = drelu / runs["continued", "swiglu"]["perplexity"]["all"]
    result["settings"]["seed"] += 1
    runs["continued", "drelu"]["perplexity"]["all"] = 2 * drelu
    (other / "result.json").write_text(json.dumps(result))
    picture = tmp_path / "series.svg"
    monkeypatch.setattr("sys.argv", ["series", str(other), str(made), "--picture", str(picture)])
    series.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if "| drelu |" in line)
    assert "| 0, 1 |" in row
    assert f"| {1.5 * ratio:.4f} [{ratio:.4f}..{2 * ratio:.4f}] |" in row
    assert "<svg" in picture.read_text()
    monkeypatch.setattr("sys.argv", ["series", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"result\.json; give the --out of runs"):
        series.main()


def test_experts_are_measured_with_those_that_a_token_was_not_sent_to(
    ablation: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    more = ["--experts", "4", "--scratch", "none", "--wide-control", "2"]
    ablation.main(arguments(data, tmp_path / "moe", *more))
    runs = result_of(tmp_path / "moe")["by_name"]
    control, base = runs["continued-swiglu+widen=2"], runs["scratch-swiglu"]["perplexity"]
    assert control["after_surgery"] == pytest.approx(base), "its new neurons add nothing yet"
    run = runs["continued-drelu"]
    for sparsity, share, whole in zip(*run["experts"].values(), strict=True):
        assert len(sparsity) == 4
        assert [s is None for s in sparsity] == [x == 0 for x in share]
        mean = sum(s * x for s, x in zip(sparsity, share, strict=True) if x)
        assert whole == pytest.approx(1 - (1 - mean) * 2 / 4)
    dense = result_of(tmp_path / "moe")["by_name"]["continued-swiglu"]
    assert dense["experts"]["whole_layer"] == [0.5, 0.5]
    assert dense["forced"][0]["perplexity"]["all"] == pytest.approx(dense["perplexity"]["all"])
    printed = capsys.readouterr().out
    assert "whole MoE layer" in printed
    assert "| layer | expert 0 |" in printed
