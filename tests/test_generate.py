"""The generation loop: sampling, stopping, prompts, and text that arrives in pieces."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, merge_predictor
from hypothesis import given, settings
from hypothesis import strategies as st

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine, Step
from turbosparse.generate import choose, generate, prompt_ids, stop_ids, stream
from turbosparse.hf.load import load_tokenizer
from turbosparse.pack import pack

Make = Callable[..., Path]
PROMPT = "The small boats"


@pytest.fixture(scope="module")
def model(sparse: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed toy model; do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    pack(str(sparse("mistral")), folder, quant="q8")
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, threads=1)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


class Script:
    """An engine that says given tokens whatever it is asked."""

    def __init__(self, says: list[int], context: int = 10_000):
        self.says = iter(says)
        self.context = context

    def new_cache(self) -> SimpleNamespace:
        return SimpleNamespace(length=0)

    def step(self, tokens: list[int], cache: SimpleNamespace) -> Step:
        cache.length += len(tokens)
        logits = torch.zeros(VOCABULARY)
        logits[next(self.says)] = 1
        return Step(logits, active=0.25, gate_positive=0.5, candidates=1.0)

    prefill = step


# --- sampling -------------------------------------------------------------------------------------


def ids(engine: Engine, tokenizer: Any, **settings: Any) -> list[int]:
    prompt = prompt_ids(tokenizer, PROMPT)
    return [token.id for token in stream(engine, tokenizer, prompt, max_tokens=10, **settings)]


def test_greedy_is_repeatable_whatever_the_seed(engine: Engine, tokenizer: Any) -> None:
    assert ids(engine, tokenizer, seed=1) == ids(engine, tokenizer, seed=2)


def test_a_seed_makes_sampling_repeatable(engine: Engine, tokenizer: Any) -> None:
    texts = [ids(engine, tokenizer, temperature=1.5, seed=seed) for seed in (0, 1, 0, 1)]
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
    assert texts[0] != texts[1]


def test_without_a_seed_texts_differ(engine: Engine, tokenizer: Any) -> None:
    assert ids(engine, tokenizer, temperature=3.0) != ids(engine, tokenizer, temperature=3.0)


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"temperature": 1e-3}])
def test_a_narrow_nucleus_or_a_low_temperature_is_greedy(
    engine: Engine, tokenizer: Any, settings: dict[str, float]
) -> None:
    sampled = ids(engine, tokenizer, **{"temperature": 1.0, "seed": 3} | settings)
    assert sampled == ids(engine, tokenizer)


def shares(temperature: float, top_p: float, draws: int = 4000) -> list[float]:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    random = torch.Generator().manual_seed(0)
    drawn = Counter(choose(logits, temperature, top_p, random) for _ in range(draws))
    return [drawn[token] / draws for token in range(4)]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [0, 1, 0, 0]),
        (1.0, 1.0, [0.1, 0.5, 0.15, 0.25]),
        (1.0, 0.6, [0, 2 / 3, 0, 1 / 3]),  # the smallest set that holds 0.6
        (1.0, 0.4, [0, 1, 0, 0]),
        (0.5, 1.0, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        (1e9, 1.0, [0.25] * 4),
        (1e-45, 1.0, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    found = shares(temperature, top_p)
    assert found == pytest.approx(expected, abs=0.03)  # four standard deviations
    assert [share == 0 for share in found] == [share == 0 for share in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature nan must be 0 or more"),
        ({"top_p": 0.0}, "top-p 0 above 0 and at most 1"),
        ({"top_p": 1.01}, "top-p 1.01 above 0"),
        ({"top_p": float("nan")}, "top-p nan above 0"),
        ({"seed": -1}, "seed -1 must be from 0 to"),
        ({"seed": 2**64}, "must be from 0 to"),
        ({"max_tokens": 0}, "max-tokens 0 must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(
    engine: Engine, tokenizer: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        next(stream(engine, tokenizer, [5], **settings))


# --- where a text ends ----------------------------------------------------------------------------


def test_the_length_ends_a_text(engine: Engine, tokenizer: Any) -> None:
    tokens = list(stream(engine, tokenizer, [5, 6], max_tokens=7))
    assert [token.finish for token in tokens] == [None] * 6 + ["length"]


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(tokenizer: Any) -> None:
    tokens = list(stream(Script([70, 71, 9, 72]), tokenizer, [5], stop=frozenset({9, 300})))
    assert [token.id for token in tokens] == [70, 71, 9]
    assert (tokens[-1].finish, tokens[-1].text) == ("stop", "")
    assert all(token.text for token in tokens[:-1])


@pytest.mark.parametrize("prompt", [CONTEXT - 8, CONTEXT - 1])
def test_the_context_ends_a_text(engine: Engine, tokenizer: Any, prompt: int) -> None:
    tokens = list(stream(engine, tokenizer, [5] * prompt, max_tokens=1000))
    assert tokens[-1].finish == "context"
    assert prompt + len(tokens) == CONTEXT + 1  # the last token needs no place


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 7])
def test_a_prompt_that_fills_the_context_names_both_numbers(
    engine: Engine, tokenizer: Any, length: int
) -> None:
    message = f"the prompt has {length} tokens; the model's context is {CONTEXT}, .*: shorten"
    with pytest.raises(TurboSparseError, match=message):
        next(stream(engine, tokenizer, [5] * length))


def test_stop_tokens_come_from_the_configs(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = copytree(model, tmp_path / "model")
    assert stop_ids(folder, tokenizer, []) == {1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert stop_ids(folder, tokenizer, []) == {1, 8, 9}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert stop_ids(folder, tokenizer, []) == {8, 9}
    assert stop_ids(folder, tokenizer, [], chat=True) == {1, 8, 9}, "the tokenizer's"
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder, tokenizer, []) == frozenset()


def test_stop_tokens_are_asked_for_by_id_or_text(model: Path, tokenizer: Any) -> None:
    assert stop_ids(model, tokenizer, ["<s>", "57"]) == {0, 1, 57}
    with pytest.raises(TurboSparseError, match="'<end>' is neither a token of the model nor an id"):
        stop_ids(model, tokenizer, ["<end>"])


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_begin_with_the_start_token(tokenizer: Any) -> None:
    assert prompt_ids(tokenizer, PROMPT)[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt_ids(tokenizer, PROMPT)[1:]) == PROMPT


def test_an_empty_prompt_starts_from_the_start_token(tokenizer: Any) -> None:
    assert prompt_ids(tokenizer, "") == [0]
    adds_none = lambda *_, **__: {"input_ids": []}  # noqa: E731
    adds_none.bos_token_id = 17
    assert prompt_ids(adds_none, "") == [17]


def test_a_prompt_without_any_token_is_refused(engine: Engine, tokenizer: Any) -> None:
    with pytest.raises(TurboSparseError, match="no token, and the model has no start token"):
        next(stream(engine, tokenizer, []))


def test_a_chat_uses_the_template(tokenizer: Any) -> None:
    found = prompt_ids(tokenizer, PROMPT, chat=True)
    assert tokenizer.decode(found) == f"[user] {PROMPT}\n[assistant] "


def test_a_chat_without_template_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TurboSparseError, match="no chat template; leave out --chat"):
        generate(folder, prompt=PROMPT, chat=True, threads=1)


# --- text in pieces -------------------------------------------------------------------------------

TEXTS = [
    "naïve café, 12 €",
    "雨が降る。",
    "🙂🙃 👩‍👩‍👧",
    " leading, trailing ",
    "line\n\nline",
    "Ω≈ç√∫",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "…and 雨"])
def test_pieces_join_to_the_text(tokenizer: Any, prompt: str, text: str) -> None:
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = prompt_ids(tokenizer, prompt)
    tokens = list(stream(Script(new), tokenizer, start, max_tokens=len(new)))
    assert "".join(token.text for token in tokens) == text == tokenizer.decode(new)
    assert not any("\ufffd" in token.text for token in tokens)


def test_a_prompt_may_end_inside_a_character(tokenizer: Any) -> None:
    whole = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(whole) == 4
    tokens = list(stream(Script(whole[2:]), tokenizer, [0, *whole[:2]], max_tokens=2))
    assert len(tokens) == 2


@settings(max_examples=60, deadline=None)
@given(new=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), data=st.data())
def test_any_tokens_stream(tokenizer: Any, new: list[int], data: st.DataObject) -> None:
    """Random bytes are no UTF-8: they must not stop a text."""
    prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8))
    tokens = list(stream(Script(new), tokenizer, prompt, max_tokens=len(new)))
    assert [token.id for token in tokens] == new


# --- generate -------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_returns_the_figures(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = generate(model, prompt=PROMPT, max_tokens=12, threads=1)
    out, err = capsys.readouterr()
    assert (out, err) == (done.text + "\n", "")
    assert done.prompt_tokens == len(prompt_ids(load_tokenizer(model), PROMPT))
    assert (done.tokens, done.finish) == (12, "length")
    assert 0.5 < done.activation_sparsity < 0.95  # dReLU of random weights: three of four
    assert f"backend cpu ({_core.isa()}), mode exact, 1 thread" in done.ran


def test_predicted_mode_says_what_its_predictor_lets_through(merged: Path, tmp_path: Path) -> None:
    pack(str(merged), tmp_path / "packed", quant="q8")
    done = generate(tmp_path / "packed", prompt=PROMPT, max_tokens=5, mode="predicted", threads=1)
    assert "mode predicted (low_rank q8 predictor, threshold -1.5, recall 50.0%)" in done.ran
    assert 0 < done.predicted_density < 1
    assert f"; predicted density {done.predicted_density:.1%}; stopped by length" in str(done)
    exact = generate(tmp_path / "packed", prompt=PROMPT, max_tokens=5, mode="exact", threads=1)
    assert exact.predicted_density == 1
    assert "predict" not in str(exact)


def test_predicted_mode_without_a_predictor_says_how_to_get_one(model: Path) -> None:
    message = "model holds no predictor; pack a model that has one merged, .*--predictor sign"
    with pytest.raises(TurboSparseError, match=message):
        generate(model, prompt=PROMPT, mode="predicted")


@pytest.mark.parametrize(
    ("recall", "mode"), [(None, "exact"), (0.98, "exact"), (0.99, "predicted"), (1, "predicted")]
)
def test_auto_takes_a_predictor_that_was_measured_to_be_good(
    sparse: Make, tmp_path: Path, recall: float | None, mode: str
) -> None:
    model = merge_predictor(sparse("llama"), tmp_path / "model", recall=recall)
    pack(str(model), tmp_path / "packed", quant="q8")
    assert Engine(tmp_path / "packed", threads=1).mode == mode


def test_generate_stops_at_a_token_asked_for(model: Path, tokenizer: Any, engine: Engine) -> None:
    greedy = ids(engine, tokenizer)
    third = tokenizer.convert_ids_to_tokens(greedy[2])
    for name in (third, str(greedy[2])):
        done = generate(model, prompt=PROMPT, max_tokens=12, stop_token=[name], threads=1)
        assert (done.finish, done.tokens) == ("stop", greedy.index(greedy[2]) + 1)


def test_generate_reads_the_prompt_from_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_prompt = generate(model, prompt=PROMPT, max_tokens=5, threads=1)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: PROMPT))
    piped = generate(model, prompt="-", max_tokens=5, threads=1)
    assert (piped.text, piped.prompt_tokens) == (given_prompt.text, given_prompt.prompt_tokens)


@pytest.mark.parametrize("setting", [{"mode": "sparse"}, {"backend": "gpu"}])
def test_an_unknown_mode_or_backend_is_refused(model: Path, setting: dict[str, str]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(TurboSparseError, match=f"{name} '{value}' is unknown; use"):
        generate(model, prompt=PROMPT, **setting)


def test_a_prompt_that_is_no_text_is_refused(model: Path) -> None:
    with pytest.raises(TurboSparseError, match="the prompt is not valid UTF-8"):
        generate(model, prompt=b"\xff".decode(errors="surrogateescape"), threads=1)


def test_a_broken_tokenizer_is_named(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TurboSparseError, match="broken: the tokenizer cannot be loaded"):
        generate(folder, prompt="hello", threads=1)
