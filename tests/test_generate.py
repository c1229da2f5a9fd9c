"""The generation loop: sampling, stopping, prompts, and text that arrives in pieces."""

from __future__ import annotations

import cProfile
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CONTEXT, VOCABULARY, merge_predictor
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, processors

import turbosparse
from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.engine.generation import Ends, Token, stream
from turbosparse.engine.sampling import Sampler, Sampling
from turbosparse.engine.text import Detokenizer, StopStrings, Tokenizer
from turbosparse.generate import generate
from turbosparse.hf.load import load_tokenizer
from turbosparse.pack import pack

Make = Callable[..., Path]
PROMPT = "The small boats"


@pytest.fixture(scope="module")
def model(packed_mistral: Path) -> Path:
    return packed_mistral


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, threads=1)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


class Script(Sampler):
    """Says given tokens whatever the logits are."""

    def __init__(self, says: list[int]):
        super().__init__()
        self.says = iter(says)

    def choose(self, logits: Any) -> int:  # noqa: ARG002
        return next(self.says)


def told(
    engine: Engine, tokenizer: Tokenizer, says: list[int], prompt: list[int], **ends: Any
) -> list[Token]:
    """The stream of an engine that says given tokens."""
    from turbosparse.engine.generation import Text, run

    with engine.sequence(prompt, sampler=Script(says)) as sequence:
        text = Text(0, sequence, tokenizer, Ends(**{"max_tokens": len(says)} | ends))
        return [token for _, token in run(engine, [text])]


# --- sampling -------------------------------------------------------------------------------------


def ids(engine: Engine, tokenizer: Tokenizer, **sampling: Any) -> list[int]:
    tokens = stream(
        engine, tokenizer, tokenizer.encode(PROMPT), sampling=Sampling(**sampling), ends=Ends(10)
    )
    return [token.id for token in tokens]


def test_greedy_is_repeatable_whatever_the_seed(engine: Engine, tokenizer: Tokenizer) -> None:
    assert ids(engine, tokenizer, seed=1) == ids(engine, tokenizer, seed=2)


def test_a_seed_makes_sampling_repeatable(engine: Engine, tokenizer: Tokenizer) -> None:
    texts = [ids(engine, tokenizer, temperature=1.5, seed=seed) for seed in (0, 1, 0, 1)]
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
    assert texts[0] != texts[1]


def test_without_a_seed_texts_differ(engine: Engine, tokenizer: Tokenizer) -> None:
    assert ids(engine, tokenizer, temperature=3.0) != ids(engine, tokenizer, temperature=3.0)


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"temperature": 1e-3}])
def test_a_narrow_nucleus_or_a_low_temperature_is_greedy(
    engine: Engine, tokenizer: Tokenizer, settings: dict[str, float]
) -> None:
    sampled = ids(engine, tokenizer, **{"temperature": 1.0, "seed": 3} | settings)
    assert sampled == ids(engine, tokenizer)


def shares(draws: int = 4000, **sampling: Any) -> list[float]:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    sampler = Sampler(Sampling(seed=0, **sampling))
    drawn = Counter(sampler.choose(logits) for _ in range(draws))
    return [drawn[token] / draws for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # the smallest that holds 0.6
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "min_p": 0.29}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 1e9}, [0.25] * 4),
        ({"temperature": 1e-45}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(
    sampling: dict[str, Any], expected: list[float]
) -> None:
    found = shares(**sampling)
    assert found == pytest.approx(expected, abs=0.03)  # four standard deviations
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_a_bias_and_a_grammar_decide_what_may_come() -> None:
    assert shares(logit_bias={0: 100.0, 2: -100.0}) == [1, 0, 0, 0]

    class Even:
        came: list[int] = []  # noqa: RUF012

        def mask(self, logits: Any) -> Any:
            return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)

        def accept(self, token: int) -> None:
            self.came.append(token)

    grammar = Even()
    for sampling in (Sampling(), Sampling(temperature=1e9, top_p=0.99, min_p=0.01, seed=1)):
        sampler = Sampler(sampling, grammar=grammar)
        for _ in range(20):
            sampler.choose(np.array([0, 5, 1, 9], np.float32))
    assert grammar.came[:20] == [2] * 20
    assert set(grammar.came[20:]) == {0, 2}


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("width", [0.01, 1.0, 5.0])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_sort(width: float, top_p: float) -> None:
    from turbosparse.engine.sampling import _nucleus

    weights = np.exp(np.random.default_rng(1).normal(0, width, 20_000).astype(np.float32))
    order = np.argsort(-weights)
    before = weights[order].cumsum(dtype=np.float64) - weights[order]
    expected = order[before < top_p * weights.sum(dtype=np.float64)]
    assert sorted(_nucleus(weights, top_p)) == sorted(expected)


def test_penalties_push_down_what_came() -> None:
    logits = np.array([1.0, 0.9, 0.5, -0.1], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), [0]).choose(logits) == 1
    assert Sampler(Sampling(presence_penalty=1.0), [0]).choose(logits) == 0, "not of the prompt"
    sampler = Sampler(Sampling(presence_penalty=0.3))
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(Sampling(frequency_penalty=0.3))
    assert [sampler.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 2]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.5, -0.1]), "the logits stay"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
    ],
)
def test_settings_out_of_range_are_named(sampling: dict[str, Any]) -> None:
    ((name, value),) = sampling.items()
    name = name.replace("_", "-")
    with pytest.raises(TurboSparseError, match=f"{name} is {value!r}; it must be a"):
        Sampling(**sampling)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_count_of_tokens_is_a_whole_number(count: Any) -> None:
    with pytest.raises(TurboSparseError, match=f"max-tokens is {count!r}; it must be a whole"):
        Ends(count)


@pytest.mark.parametrize("token", [-1, 2**40, 1.5, "a"])
def test_a_prompt_of_tokens_that_are_none_is_refused(
    engine: Engine, tokenizer: Tokenizer, token: Any
) -> None:
    with pytest.raises(TurboSparseError, match=f"token {token!r} is "):
        next(stream(engine, tokenizer, [5, token]))


# --- where a text ends ----------------------------------------------------------------------------


def test_the_length_ends_a_text(engine: Engine, tokenizer: Tokenizer) -> None:
    tokens = list(stream(engine, tokenizer, [5, 6], ends=Ends(7)))
    assert [token.finish for token in tokens] == [None] * 6 + ["length"]


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    tokens = told(engine, tokenizer, [70, 71, 9, 72], [5], ids=frozenset({9, 300}))
    assert [token.id for token in tokens] == [70, 71, 9]
    assert (tokens[-1].finish, tokens[-1].text) == ("stop", "")
    assert all(token.text for token in tokens[:-1])


@pytest.mark.parametrize("prompt", [CONTEXT - 8, CONTEXT - 1])
def test_the_context_ends_a_text(engine: Engine, tokenizer: Tokenizer, prompt: int) -> None:
    tokens = list(stream(engine, tokenizer, [5] * prompt, ends=Ends(1000)))
    assert tokens[-1].finish == "context"
    assert prompt + len(tokens) == CONTEXT + 1  # the last token needs no place


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 7])
def test_a_prompt_that_fills_the_context_names_both_numbers(
    engine: Engine, tokenizer: Tokenizer, length: int
) -> None:
    message = f"the prompt has {length} tokens; the model's context is {CONTEXT}, .*: shorten"
    with pytest.raises(TurboSparseError, match=message):
        next(stream(engine, tokenizer, [5] * length))


def test_stop_tokens_come_from_the_configs(model: Path, tmp_path: Path) -> None:
    folder = copytree(model, tmp_path / "model")
    assert Tokenizer(folder).stop_ids() == {1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert Tokenizer(folder).stop_ids() == {1, 8, 9}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert Tokenizer(folder).stop_ids() == {8, 9}
    assert Tokenizer(folder).stop_ids(chat=True) == {1, 8, 9}, "the tokenizer's"
    (folder / "generation_config.json").unlink()
    assert Tokenizer(folder).stop_ids() == {1}, "the tokenizer's"


def test_stop_tokens_are_asked_for_by_id_or_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids(["<s>", "57"]) == {0, 1, 57}
    with pytest.raises(TurboSparseError, match="'<end>' is neither a token of the model nor an id"):
        tokenizer.stop_ids(["<end>"])


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_are_those_of_transformers(model: Path, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(model)
    for text in (PROMPT, "", *TEXTS):
        assert tokenizer.encode(text) == (theirs(text)["input_ids"] or [0])
        assert tokenizer.decode(tokenizer.encode(text)) == text
    turns = [{"role": "user", "content": PROMPT}]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert tokenizer.chat(turns) == list(expected["input_ids"])
    assert tokenizer.decode(tokenizer.chat(turns)) == f"[user] {PROMPT}\n[assistant] "


def changed(model: Path, folder: Path, change: Callable[[Fast], None], **settings: Any) -> Path:
    """A copy of a model with a changed tokenizer."""
    copytree(model, folder)
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    change(fast)
    fast.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_an_end_token_that_the_tokenizer_adds_is_not_part_of_a_prompt(
    model: Path, tmp_path: Path
) -> None:
    def add_both(fast: Fast) -> None:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )

    tokenizer = Tokenizer(changed(model, tmp_path / "model", add_both))
    assert tokenizer.encode(PROMPT)[0] == 0
    assert tokenizer.encode(PROMPT)[-1] != 1
    assert tokenizer.encode(f"{PROMPT}</s>")[-1] == 1, "what the text says stays"


def test_a_prompt_without_any_token_is_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    with pytest.raises(TurboSparseError, match="no token, and the model has no start token"):
        next(stream(engine, tokenizer, []))


def test_a_chat_without_template_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TurboSparseError, match=r"no chat template: .* without --chat"):
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
@pytest.mark.parametrize("prompt", ["", "…and 雨", "ends in \ufffd"])
def test_pieces_join_to_the_text(
    engine: Engine, tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    new = tokenizer.encode(text, special=False)
    tokens = told(engine, tokenizer, new, tokenizer.encode(prompt))
    assert "".join(token.text for token in tokens) == text == tokenizer.decode(new)
    assert not any("\ufffd" in token.text for token in tokens)


def test_a_prompt_may_end_inside_a_character(engine: Engine, tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("🙂", special=False)
    assert len(whole) == 4
    tokens = told(engine, tokenizer, whole[2:], [0, *whole[:2]])
    assert [token.text for token in tokens] == ["", "🙂"]


@settings(max_examples=60, deadline=None)
@given(new=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), data=st.data())
def test_any_tokens_are_text(tokenizer: Tokenizer, new: list[int], data: st.DataObject) -> None:
    """Random bytes are not UTF-8: they must not stop a text."""
    prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8))
    stream = Detokenizer(tokenizer, prompt)
    ("".join(map(stream.step, new)) + stream.finish()).encode()


@pytest.fixture(scope="module")
def fallback(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the kind of Llama 2: words with ▁ for a space, and single bytes."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "A", "▁upon", "▁"]
    fast = Fast(models.BPE({w: n for n, w in enumerate(words)}, [], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = copytree(model, tmp_path_factory.mktemp("fallback") / "model")
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_bytes_that_are_no_character_become_replacement_characters(fallback: Tokenizer) -> None:
    a, upon, byte = 259, 260, 3
    euro = [byte + value for value in "€".encode()]
    for tokens, pieces in (
        ([a, byte + 0xE2, upon], ["A", "", "\ufffd upon"]),
        ([*euro, byte + 0xE2, upon], ["", "", "€", "", "\ufffd upon"]),
        ([a, *euro, upon], ["A", "", "", "€", " upon"]),
        ([byte + 0xFF, a], ["\ufffd", "A"]),
    ):
        stream = Detokenizer(fallback, [a])
        assert [stream.step(token) for token in tokens] == pieces
        assert stream.finish() == ""
    stream = Detokenizer(fallback, [0])
    assert [stream.step(upon), stream.step(upon), stream.step(byte + 0xE2)] == ["upon", " upon", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "ended"),
    [
        (["one ", "two", " three"], ["two"], "one ", True),
        (["a", "b", "c", "d"], ["bcd"], "a", True),
        (["a", "b", "c", "x"], ["bcd"], "abcx", False),
        (["ab", "ab", "c"], ["abc", "zz"], "ab", True),
        (["abc"], ["c", "bc"], "a", True),
        (["ab"], ["bcd"], "ab", False),
        (["a", "", "b"], [], "ab", False),
    ],
)
def test_stop_strings_end_a_text_across_pieces(
    pieces: list[str], stops: list[str], expected: str, ended: bool
) -> None:
    strings, text = StopStrings(stops), ""
    for piece in pieces:
        more, stopped = strings.step(piece)
        text += more
        if stopped:
            break
    assert (text + strings.finish(), stopped) == (expected, ended)


def test_a_stop_string_ends_generation(engine: Engine, tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("one two three", special=False)
    tokens = told(engine, tokenizer, new, [5], strings=("wo t",))
    assert "".join(token.text for token in tokens) == "one t"
    assert tokens[-1].finish == "stop"


BROKEN_TEMPLATES = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('only pairs') }}", "only pairs"),
    "content": ("{{ messages[0].content + 1 }}", "TypeError"),
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "took more than",
    ),
    "memory": ("{% set x = 'a' * 10 ** 10 %}", "memory"),
    "escape": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
}


@pytest.mark.parametrize("kind", BROKEN_TEMPLATES)
def test_a_template_that_cannot_be_used_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from turbosparse.engine import template

    monkeypatch.setattr(template, "SECONDS", 1)
    source, message = BROKEN_TEMPLATES[kind]
    folder = copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(TurboSparseError, match=f"chat template .*{message}"):
        Tokenizer(folder).chat([{"role": "user", "content": "hi"}])


# --- generate -------------------------------------------------------------------------------------


def test_generate_shows_pieces_and_returns_the_figures(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []
    done = generate(str(model), PROMPT, max_tokens=12, threads=1, show=pieces.append)
    assert capsys.readouterr() == ("", "")
    assert "".join(pieces) == done.text + "\n"
    assert done.prompt_tokens == len(Tokenizer(model).encode(PROMPT))
    assert (done.tokens, done.finish) == (12, "length")
    assert 0.5 < done.activation_sparsity < 0.95  # dReLU of random weights: three of four
    assert f"backend cpu ({_core.isa()}), mode exact, 1 thread" in done.ran


@pytest.mark.parametrize("name", ["hf", "gguf", "org/name"])
def test_a_model_that_is_not_packed_yet_gets_its_commands(
    sparse: Make, tmp_path: Path, name: str
) -> None:
    path = {"hf": sparse("mistral"), "gguf": tmp_path / "a.gguf"}.get(name, Path(name))
    out = f"{path.name.removesuffix('.gguf')}-packed"
    with pytest.raises(TurboSparseError, match=f"turbosparse pack {path} {out}`"):
        generate(path, PROMPT)


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
    message = "mistral holds no predictor; pack a model that has one merged, .*--predictor sign"
    with pytest.raises(TurboSparseError, match=message):
        generate(model, prompt=PROMPT, mode="predicted")


@pytest.mark.parametrize(
    ("measured", "mode"),
    [
        ({"recall": 1.0}, "exact"),  # says nothing of quality
        ({"perplexity": 1.0009, "bytes": 0.9}, "predicted"),
        ({"perplexity": 1.0011, "bytes": 0.9}, "exact"),
        ({"perplexity": 1.0011, "bytes": 0.9, "bound": 1.002}, "predicted"),
        ({"perplexity": 1.0, "bytes": 1.1}, "exact"),
    ],
)
def test_auto_takes_a_predictor_that_was_measured_to_pay(
    sparse: Make, tmp_path: Path, measured: dict[str, float], mode: str
) -> None:
    model = merge_predictor(sparse("llama"), tmp_path / "model", **measured)
    pack(str(model), tmp_path / "packed", quant="q8")
    assert Engine(tmp_path / "packed", threads=1).mode == mode


def test_generate_stops_at_a_token_asked_for(
    model: Path, tokenizer: Tokenizer, engine: Engine
) -> None:
    greedy = ids(engine, tokenizer)
    third = next(t for t, n in tokenizer.vocabulary.items() if n == greedy[2])
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


# --- the Python API -------------------------------------------------------------------------------


def test_the_python_api(model: Path) -> None:
    loaded = turbosparse.load(model, threads=1)
    pieces = list(loaded.stream(PROMPT, max_tokens=8, temperature=1.0, seed=3))
    text = "".join(piece.text for piece in pieces)
    assert text == loaded.generate(PROMPT, max_tokens=8, temperature=1.0, seed=3)
    both = loaded.generate([PROMPT, "Gulls"], max_tokens=8)
    assert both == [loaded.generate(one, max_tokens=8) for one in (PROMPT, "Gulls")]
    stopped = loaded.generate(PROMPT, max_tokens=8, stop=both[0][3:5])
    assert stopped == both[0][: both[0].index(both[0][3:5])]
    with pytest.raises(TurboSparseError, match="setting 'temprature' is unknown; use max_tokens"):
        loaded.generate(PROMPT, temprature=1)


def test_scores_are_the_log_probabilities_of_transformers(sparse: Make, tmp_path: Path) -> None:
    import torch

    from turbosparse.hf.load import load_model

    pack(str(sparse("mistral")), tmp_path / "packed", quant="f16")
    loaded = turbosparse.load(tmp_path / "packed", threads=1)
    ids = loaded.tokenizer.encode(PROMPT * 5)
    with torch.inference_mode():
        logits = load_model(sparse("mistral")).eval()(torch.tensor([ids])).logits[0]
    truth = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert loaded.score(PROMPT * 5) == pytest.approx(truth.numpy(), abs=0.02)
    assert loaded.score(ids).shape == (len(ids) - 1,)
    with pytest.raises(TurboSparseError, match="a text of 1 tokens has nothing to score"):
        loaded.score([5])


def test_loading_does_not_grow_faster_than_the_added_tokens(model: Path, tmp_path: Path) -> None:
    def calls(count: int) -> int:
        folder = shutil.copytree(model, tmp_path / str(count))
        fields = json.loads((folder / "tokenizer.json").read_text())
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        fields["added_tokens"] += [
            {"id": 320 + n, "content": f"<extra {n}>", "special": n % 2 == 0, **plain}
            for n in range(count)
        ]
        (folder / "tokenizer.json").write_text(json.dumps(fields))
        profile = cProfile.Profile()
        tokenizer = profile.runcall(Tokenizer, folder)
        assert tokenizer.encode(f"<extra {count - 1}>", special=False) == [319 + count]
        return sum(entry.callcount for entry in profile.getstats())

    small, large = calls(1000), calls(4000)
    assert large - small <= 3000, "at most one call for each added token"
