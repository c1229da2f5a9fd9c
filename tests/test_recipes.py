"""The recipes state the paper's training, and run with toy widths on data that stands in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import VOCABULARY

from turbosparse.hf.load import load_tokenizer
from turbosparse.packed.synthetic import SHAPES
from turbosparse.prepare import prepare
from turbosparse.train import run_recipe, train
from turbosparse.training.mixture import Source
from turbosparse.training.plan import Plan
from turbosparse.training.recipe import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = ["mistral_7b", "mixtral_8x7b"]
# Table 4, in percent
MIXTURE = {
    "pile_academic": 2.69,
    "pes2o": 7.83,
    "wanjuan_cc": 73.55,
    "redpajama_wiki": 0.65,
    "openwebtext2": 0.44,
    "redpajama_books": 6.54,
    "pile_pg19": 0.37,
    "open_web_math": 1.46,
    "proof_pile_2": 0.76,
    "algebraic_stack": 0.54,
    "starcoder_java": 0.77,
    "starcoder_csharp": 0.74,
    "starcoder_typescript": 0.52,
    "starcoder_remaining": 1.73,
    "github_code": 1.41,
}
LENGTH, BATCH = 32, 2


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_paper_s_to_the_last_digit(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert {s.name: round(s.proportion * 100, 6) for s in recipe.data.sources} == MIXTURE
    assert sum(s.proportion for s in recipe.data.sources) == pytest.approx(1, abs=1e-12)
    assert recipe.activation == "drelu"
    assert (recipe.tokens, recipe.batch_size, recipe.data.sequence_length) == (150e9, 2048, 4096)
    assert recipe.steps() == 17881
    assert (recipe.learning_rate, recipe.min_learning_rate) == (5e-5, 5e-6)
    assert (recipe.warmup_steps, recipe.betas) == (1000, (0.9, 0.95))


@pytest.mark.parametrize("name", [*PAPER, *(f"{name}_sft" for name in PAPER)])
def test_eight_gpus_of_80_gb_hold_a_recipe(tmp_path: Path, name: str) -> None:
    family = "mixtral-8x7b" if "mixtral" in name else "mistral-7b"
    fields = SHAPES[family] | {"max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    planned = train(RECIPES / f"{name}.yaml", model=str(tmp_path), plan=True, processes=8)
    assert isinstance(planned, Plan)
    assert planned.total < 76e9, "the CUDA context and fragments take the rest"
    assert (planned.offloaded > 0) == (family == "mixtral-8x7b")


@pytest.mark.parametrize("name", PAPER)
def test_fine_tuning_is_on_conversations(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}_sft.yaml")
    assert {source.format for source in recipe.data.sources} == {"chat"}
    assert [source.name for source in recipe.data.sources] == ["orca_math", "bagel"]


def row(source: Source, number: int) -> dict[str, object]:
    """A row as the hub set of `source` has it."""
    text = f"{source.name} has {number} boats and {number * number} gulls. "
    if source.name == "bagel":
        turns = [("human", text), ("gpt", text[::-1])]
        return {"conversations": [{"from": who, "value": said} for who, said in turns]}
    if source.name == "orca_math":
        return {"question": text, "answer": text[::-1]}
    kinds = source.where.get("meta.pile_set_name", [""])
    field = source.template.strip("{}")
    return {field: text, "meta": {"pile_set_name": kinds[number % len(kinds)]}}


@pytest.mark.parametrize("way", ["stream", "prepared"])
@pytest.mark.parametrize("name", [*PAPER, *(f"{name}_sft" for name in PAPER)])
def test_two_steps_of_each_recipe(
    tmp_path: Path, dense: Callable[[str], Path], name: str, way: str
) -> None:
    family = "mixtral" if "mixtral" in name else "mistral"
    recipe = read_recipe(RECIPES / f"{name}.yaml", model=str(dense(family)), precision="fp32")
    small = {"tokens": 2 * BATCH * LENGTH, "batch_size": BATCH, "micro_batch_size": 1}
    here = {"log_every": 1, "shard": "none", "offload": False}
    recipe = recipe.model_copy(update=small | here)
    recipe.data.sequence_length = LENGTH
    data = tmp_path / "data"
    for source in recipe.data.sources:
        file = data / source.name / "part.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row(source, n)) + "\n" for n in range(9)))
    if way == "prepared":
        stated = tmp_path / "recipe.yaml"  # JSON is YAML
        stated.write_text(recipe.model_dump_json())
        prepare(stated, data=data, out=tmp_path / "made", processes=1)
        data = tmp_path / "made"
    trained = run_recipe(recipe, out=tmp_path / "out", root=data)
    assert (trained.steps, trained.tokens) == (2, 2 * BATCH * LENGTH)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == VOCABULARY + 2 * name.endswith("sft")
