"""Speculation: guessed tokens, checked in one pass, never change a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from serving import serving

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.drafting import LENGTHS, Draft, Lookup, open_draft
from turbosparse.engine.engine import Engine
from turbosparse.engine.generation import Ends, stream
from turbosparse.engine.sampling import Sampling
from turbosparse.engine.text import Tokenizer

LENGTH = 40


class Oracle(Draft):
    """Knows a text, and guesses every fifth of its tokens wrong."""

    def __init__(self, text: list[int], ahead: int = 3):
        super().__init__()
        self.text, self.ahead = text, ahead
        self.passes: list[tuple[int, int]] = []

    def guesser(self) -> Oracle:
        return self

    def length(self) -> int:
        return self.ahead

    def guess(self, tokens: list[int], count: int) -> list[int]:
        known = [(token + (index % 5 == 0)) % 300 for index, token in enumerate(self.text)]
        return known[len(tokens) : len(tokens) + count]

    def note(self, count: int, held: int, seconds: float) -> None:
        assert seconds > 0
        self.passes.append((count, held))


@pytest.mark.parametrize("ahead", LENGTHS[1:])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5},
    ],
)
def test_a_text_is_the_same_with_guesses(
    engine: Engine, tokenizer: Tokenizer, settings: dict[str, Any], ahead: int
) -> None:
    prompt, sampling = tokenizer.encode("The small boats"), Sampling(**settings)

    def tokens(draft: Draft | None) -> list[tuple[int, str, float, str | None]]:
        told = stream(engine, tokenizer, prompt, sampling=sampling, ends=Ends(LENGTH), draft=draft)
        return [(token.id, token.text, token.active, token.finish) for token in told]

    plain = tokens(None)
    oracle = Oracle(prompt + [token[0] for token in plain], ahead)
    assert tokens(oracle) == plain
    assert any(held == count for count, held in oracle.passes if count) == (ahead < 5)
    assert any(held < count for count, held in oracle.passes)
    assert len(oracle.passes) < LENGTH - 1


@pytest.mark.parametrize("stop", range(3, 9))
def test_a_text_ends_where_it_does_without_guesses(
    engine: Engine, tokenizer: Tokenizer, stop: int
) -> None:
    """At an end token, a length or a full context, in the midst of guesses that hold."""
    prompt = tokenizer.encode("The small boats")
    text = prompt + [token.id for token in stream(engine, tokenizer, prompt, ends=Ends(LENGTH))]
    new = text[len(prompt) : len(prompt) + stop]
    room = len(prompt) + stop
    for ends, context in (
        (Ends(LENGTH, frozenset(new[-1:])), None),
        (Ends(stop), None),
        (Ends(LENGTH), room),
    ):
        found = []
        for draft in (None, Oracle(text, 7)):
            with engine.sequence(context=context) as sequence:
                told = stream(engine, tokenizer, prompt, ends=ends, sequence=sequence, draft=draft)
                found.append(([(t.id, t.text, t.finish) for t in told], sequence.tokens[:]))
        assert found[0] == found[1]


def test_a_pass_that_fails_leaves_the_text_without_guesses(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokenizer.encode("The small boats")
    text = prompt + [token.id for token in stream(engine, tokenizer, prompt, ends=Ends(LENGTH))]
    with engine.sequence() as sequence:
        told = stream(engine, tokenizer, prompt, sequence=sequence, draft=Oracle(text))
        next(told)
        monkeypatch.setattr(engine.budget, "limit", 0)
        monkeypatch.setattr(engine.decoder, "cache_bytes", lambda positions, _: positions << 30)
        with pytest.raises(TurboSparseError, match="the key-value cache needs"):
            next(told)
        assert sequence.tokens == text[: len(prompt) + 1]


def test_guesses_take_no_memory_that_the_text_does_not_need(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget holds the text up to its end token, and not one position more."""
    prompt = tokenizer.encode("The small boats")
    sampling = Sampling(temperature=1.0, seed=4)
    told = stream(engine, tokenizer, prompt, sampling=sampling, ends=Ends(LENGTH))
    plain = [token.id for token in told]
    last = next(n for n in range(20, LENGTH) if plain[n] not in plain[:n])
    monkeypatch.setattr(engine.decoder, "cache_bytes", lambda positions, _: positions << 20)
    monkeypatch.setattr(engine.budget, "limit", (len(prompt) + last) << 20)
    ends, oracle = Ends(LENGTH, frozenset(plain[last : last + 1])), Oracle(prompt + plain, 7)
    told = stream(engine, tokenizer, prompt, sampling=sampling, ends=ends, draft=oracle)
    assert [token.id for token in told] == plain[: last + 1]
    assert any(held for _, held in oracle.passes)


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([1, 2, 3, 4, 5, 9, 2, 3], [4, 5, 9, 2]),
        ([1, 2, 3, 4, 9, 2, 3, 7, 5, 2, 3], [7, 5, 2, 3]),  # of two places the later
        ([8, 1, 2, 3, 4, 9, 2, 3, 7, 5, 1, 2, 3], [4, 9, 2, 3]),  # but rather the longer match
        ([6, 7, 6, 7, 6, 7], [6, 7, 6, 7]),  # it repeats itself beyond its end
        ([1, 2, 3, 4, 5], []),
        ([4], []),
    ],
)
def test_a_lookup_says_what_followed(tokens: list[int], guess: list[int]) -> None:
    assert Lookup().guess(tokens, 4) == guess
    grown = Lookup()
    for length in range(1, len(tokens)):
        grown.guess(tokens[:length], 4)
    assert grown.guess(tokens, 4) == guess


def rehearse(draft: Draft, seconds: dict[int, float], holds: float, passes: int) -> list[int]:
    """The lengths that a draft takes if passes cost so much and the guesses hold so often."""
    lengths, luck = [], 0.0
    for _ in range(passes):
        lengths.append(draft.length())
        held = 0
        while held < lengths[-1]:
            luck += holds
            if luck < 1:
                break
            luck, held = luck - 1, held + 1
        draft.note(lengths[-1], held, seconds[lengths[-1]])
    return lengths


def test_it_guesses_as_far_as_it_pays() -> None:
    cheap, dear = {0: 1.0, 1: 1.05, 3: 1.2, 7: 1.5}, {0: 1.0, 1: 1.9, 3: 3.8, 7: 7.5}
    assert set(rehearse(Draft(), cheap, 0.97, 400)[200:]) == {7}
    assert set(rehearse(Draft(), cheap, 0.6, 400)[200:]) <= {1, 3, 7}
    lengths = rehearse(Draft(), dear, 0.5, 400)
    assert sum(length > 0 for length in lengths) <= 10  # it rests, and asks again now and then
    assert any(lengths[200:])


def test_a_smaller_model_guesses(packed_mistral: Path, engine: Engine, tokenizer: Tokenizer):
    """The model itself is the one whose guesses all hold."""
    draft = open_draft(packed_mistral, engine, tokenizer)
    assert draft
    prompt = tokenizer.encode("The small boats")
    plain = [token.id for token in stream(engine, tokenizer, prompt, ends=Ends(LENGTH))]
    told = stream(engine, tokenizer, prompt, ends=Ends(LENGTH), draft=draft)
    assert [token.id for token in told] == plain
    guesser = draft.guesser()
    assert guesser.guess(prompt, 7) == plain[:7]
    assert guesser.guess([*prompt, *plain[:20]], 3) == plain[20:23]
    full = list(prompt)[:1] * (engine.context - 2)
    assert guesser.guess(full, 3) == []


def test_a_model_of_another_vocabulary_is_refused(
    packed_mistral: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    other = shutil.copytree(packed_mistral, tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["added_tokens"][0]["content"] = "<other>"
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(TurboSparseError, match="its vocabulary is not that of"):
        open_draft(other, engine, tokenizer)
    assert open_draft("off", engine, tokenizer) is None


def test_a_text_that_is_served_alone_is_guessed_ahead(
    packed_mistral: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("The small boats")
    body = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "logprobs": 1}
    text = prompt + [token.id for token in stream(engine, tokenizer, prompt, ends=Ends(LENGTH))]
    oracle, answers = Oracle(text), []
    with serving(packed_mistral) as server, server.server.models.using(None) as served:
        for draft in (None, oracle):
            served.draft = draft
            answer = httpx.post(f"{server.address}/v1/completions", json=body)
            answers.append(answer.json()["choices"])
    assert answers[0] == answers[1]
    assert sum(held for _, held in oracle.passes) > LENGTH / 3
