"""The generation loop: stopping, prompts, and text that arrives in pieces."""

from __future__ import annotations

import cProfile
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

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
from turbosparse.engine.sampling import Sampler
from turbosparse.engine.text import Detokenizer, StopStrings, Tokenizer
from turbosparse.generate import generate
from turbosparse.hf.load import load_tokenizer
from turbosparse.pack import pack

Make = Callable[..., Path]
PROMPT = "The small boats"


@pytest.fixture(scope="module")
def model(packed_mistral: Path) -> Path:
    return packed_mistral


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


# --- where a text ends ----------------------------------------------------------------------------


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
    told = stream(engine, tokenizer, tokenizer.encode(PROMPT), ends=Ends(10))
    greedy = [token.id for token in told]
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


@pytest.mark.parametrize("setting", [{"mode": "sparse"}, {"backend": "tpu"}])
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
