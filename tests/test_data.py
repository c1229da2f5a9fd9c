"""Documents from files, packed into sequences, mixed in the proportions that a recipe asks for."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_tokenizer
from turbosparse.training.mixture import (
    Mixture,
    Skips,
    Source,
    missing_sources,
    packed_sequences,
    training_stream,
)
from turbosparse.training.readers import documents, drop_last, take_last

BOS, EOS = 0, 1
LENGTH = 16


@pytest.fixture(scope="session")
def tokenizer(dense: Callable[[str], Path]) -> Any:
    return load_tokenizer(dense("mistral"))


def write(path: Path, content: str | bytes) -> Path:
    """Write a corpus file, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def packed(
    texts: Iterable[str], tokenizer: Any, length: int, *, append_eos: bool = True
) -> list[list[int]]:
    rows = packed_sequences(texts, tokenizer, length, append_eos=append_eos)
    return [row["input_ids"] for row in rows]


def mixture(*sources: dict[str, object], **changes: object) -> Mixture:
    return Mixture.model_validate({"sources": list(sources), "sequence_length": LENGTH, **changes})


# --- documents
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\ntwo\n", ["one\ntwo\n"]),
        ("a.md", "# é ×\n", ["# é ×\n"]),
        ("a.jsonl", rows("one", "two") + "\n" + rows("three"), ["one", "two", "three"]),
        ("a.JSONL", rows("one", "two"), ["one", "two"]),
        ("a.ndjson", rows("one", "two"), ["one", "two"]),
        ("a.json", rows("one", "two"), ["one", "two"]),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=1), ["one", "two"]),
        ("a.txt", codecs.BOM_UTF8 + b"one", ["one"]),
        ("a.jsonl", codecs.BOM_UTF8 + rows("one").encode(), ["one"]),
    ],
)
def test_a_file_gives_its_documents(
    tmp_path: Path, name: str, content: str | bytes, expected: list[str], packing: str
) -> None:
    assert list(documents(write(tmp_path / (name + packing), content))) == expected


def test_a_folder_gives_the_documents_of_its_files_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.jsonl.gz", rows("first"))
    write(tmp_path / "c.md", "third")
    write(tmp_path / "weights.bin", b"\xff\x00")  # no corpus file: left alone
    assert list(documents(tmp_path)) == ["first", "second", "third"]


def test_a_separator_cuts_a_text_file_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n===\n\n===\n two \n===\n")
    assert list(documents(path, separator="===")) == ["one", "two"]


@pytest.mark.parametrize("piece", [2, 5, 1000])
def test_a_text_file_is_read_in_pieces_that_no_document_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("turbosparse.training.readers._CHUNK", piece)
    path = write(tmp_path / "a.txt", "é one\r\n===\r\ntwo 🙂===== \rthree==")
    assert list(documents(path, separator="===")) == ["é one", "two 🙂", "== \nthree=="]
    with pytest.raises(TurboSparseError, match=r"byte 0xe9 at 10\)"):
        list(documents(write(tmp_path / "b.txt", b"one two \xc3\xa9\xe9 three")))


def test_one_document_at_a_time_of_a_text_file_is_held(tmp_path: Path) -> None:
    path, size = tmp_path / "a.txt", 1 << 25
    path.write_text(("some words " * 1000 + "===") * (size // 11003))
    tracemalloc.start()
    assert sum(map(len, documents(path, separator="==="))) > 0.99 * size
    assert tracemalloc.get_traced_memory()[1] < size / 4
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.zst"])
def test_a_file_that_is_neither_text_nor_rows_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TurboSparseError, match="neither text nor JSON lines; convert it"):
        list(documents(write(tmp_path / name, "a,b\n1,2\n")))


def test_a_template_makes_text_of_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "1+1", "answer": 2}\n')
    assert list(documents(path, template="{question} = {answer}")) == ["1+1 = 2"]


def test_a_field_that_is_null_is_empty_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n')
    assert list(documents(path)) == ["one"]


def test_a_corpus_that_is_not_there_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TurboSparseError, match=r"no such file or folder: .*nowhere"):
        list(documents(tmp_path / "nowhere"))
    with pytest.raises(TurboSparseError, match=r"holds no corpus file; known are \.txt"):
        list(documents(tmp_path))
    write(tmp_path / "a.txt", " \n")
    write(tmp_path / "b.jsonl", rows("", "\t"))
    with pytest.raises(TurboSparseError, match="holds no text: every document in it is empty"):
        list(documents(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 0xe9 at 3\)"),
        (
            "a.jsonl",
            rows(*["x" * 500] * 40).encode() + b'{"text": "\xff"}\n',
            r"a\.jsonl:41 is not UTF-8 text \(byte 0xff at 10\)",
        ),
        ("a.jsonl", rows("one") + '{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        (
            "a.jsonl",
            '{"title": "T", "body": "B"}\n',
            r"a\.jsonl:1 does not fit the template '\{text\}': the row has title, body",
        ),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl:1 is not a row of fields, but a list"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        list(documents(write(tmp_path / name, content)))


@pytest.mark.parametrize("template", ["{text", "{}", "{text[0]} {text.title.nothing}"])
def test_a_template_that_is_none_is_refused(tmp_path: Path, template: str) -> None:
    path = write(tmp_path / "a.jsonl", rows("one"))
    with pytest.raises(TurboSparseError, match="does not fit the template"):
        list(documents(path, template=template))


@pytest.mark.parametrize("damage", ["no gzip", "cut short", "garbled"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(bytes(range(32, 127)) * 50)
    garbled = whole[:12] + bytes(byte ^ 0xFF for byte in whole[12:40]) + whole[40:]
    content = {"no gzip": b"plain text", "cut short": whole[:-12], "garbled": garbled}[damage]
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(TurboSparseError, match=r"a\.txt\.gz is a broken gzip file"):
        list(documents(tmp_path))


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_the_last_documents_held_out_are_those_that_training_skips(count: int) -> None:
    items = list("abcde")
    kept, held_out = list(drop_last(items, count)), take_last(items, count)
    assert kept + held_out == items
    assert len(held_out) == min(count, 5)
    assert take_last(items, None) == items


# --- packing
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("append_eos", [True, False])
def test_packing_keeps_every_token_in_order_but_the_tail(
    tokenizer: Any, corpus: Path, length: int, append_eos: bool
) -> None:
    texts = list(documents(corpus))
    sequences = packed(texts, tokenizer, length, append_eos=append_eos)
    whole = [
        token
        for text in texts
        for token in tokenizer(text)["input_ids"] + ([EOS] if append_eos else [])
    ]
    assert {len(sequence) for sequence in sequences} == {length}
    assert list(chain.from_iterable(sequences)) == whole[: len(whole) // length * length]


def test_each_document_stands_between_bos_and_eos(tokenizer: Any) -> None:
    (sequence,) = packed(["ab" * 9, "c" * 40], tokenizer, 32)
    end = sequence.index(EOS)
    assert sequence[0] == BOS
    assert sequence[end + 1] == BOS
    assert tokenizer.decode(sequence[1:end]) == "ab" * 9


def test_a_tokenizer_that_ends_a_text_itself_ends_it_once(
    dense: Callable[[str], Path],
) -> None:
    from tokenizers.processors import TemplateProcessing

    own = load_tokenizer(dense("mistral"))
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    own.backend_tokenizer.post_processor = ends
    (sequence,) = packed(["a boat", "c" * 40], own, 32)
    assert sequence[sequence.index(EOS) + 1] == BOS


# --- mixtures
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [
                {"name": "web", "path": "a", "proportion": 0.5},
                {"name": "code", "path": "b", "proportion": 0.4},
            ],
            r"add up to 0\.9, not 1 \(web 0\.5, code 0\.4\)",
        ),
        ([{"name": "web", "path": "a", "proportion": 0.5}] * 2, "two sources have the same name"),
        ([{"name": "web", "proportion": 1}], "'web' needs exactly one of path and dataset"),
        (
            [{"name": "web", "proportion": 1, "path": "a", "dataset": "org/b"}],
            "'web' needs exactly one of path and dataset",
        ),
        ([{"name": "web", "proportion": 1, "path": "a", "weight": 2}], r"weight\n.*not permitted"),
        ([], "at least 1 item"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(
    sources: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        mixture(*sources)


@pytest.fixture
def two_sources(tmp_path: Path) -> list[dict[str, object]]:
    """80 % from documents of one letter `a`, 20 % from documents of 150 letters `b`."""
    write(tmp_path / "short.jsonl", rows(*["a"] * 2000))
    write(tmp_path / "long.jsonl", rows(*["b " * 150] * 20))
    return [
        {"name": "short", "path": "short.jsonl", "proportion": 0.8},
        {"name": "long", "path": "long.jsonl", "proportion": 0.2},
    ]


def test_proportions_hold_in_tokens_whatever_the_lengths_of_the_documents(
    tmp_path: Path, tokenizer: Any, two_sources: list[dict[str, object]]
) -> None:
    stream = training_stream(mixture(*two_sources), tokenizer, root=tmp_path, seed=0)
    count = 500
    drawn = [tokenizer.decode(row["input_ids"]) for row in islice(stream, count)]
    assert not any("a" in text and "b" in text for text in drawn)
    share = sum("a" in text for text in drawn) / count
    assert share == pytest.approx(0.8, abs=4 * sqrt(0.8 * 0.2 / count))


def numbered(tmp_path: Path, name: str, count: int) -> dict[str, object]:
    """A source whose sequences all differ."""
    write(tmp_path / f"{name}.jsonl", rows(*(f"{name} {n} {n * n}" for n in range(count))))
    return {"name": name, "path": f"{name}.jsonl", "proportion": 0.5}


def draw(tmp_path: Path, tokenizer: Any, mix: Mixture, seed: int, count: int) -> list[list[int]]:
    stream = training_stream(mix, tokenizer, root=tmp_path, seed=seed)
    return [row["input_ids"] for row in islice(stream, count)]


def test_the_seed_alone_decides_the_order(tmp_path: Path, tokenizer: Any) -> None:
    mix = mixture(numbered(tmp_path, "x", 100), numbered(tmp_path, "y", 100))
    first = draw(tmp_path, tokenizer, mix, 3, 40)
    assert draw(tmp_path, tokenizer, mix, 3, 40) == first
    assert draw(tmp_path, tokenizer, mix, 4, 40) != first


def test_sources_are_shuffled_and_small_ones_repeat_without_end(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = {**numbered(tmp_path, "x", 10), "proportion": 1}
    mix = mixture(source)
    once = packed(documents(tmp_path / "x.jsonl"), tokenizer, LENGTH)
    drawn = draw(tmp_path, tokenizer, mix, 0, 3 * len(once))
    assert drawn[: len(once)] != once
    passes = [drawn[start:][: len(once)] for start in range(0, len(drawn), len(once))]
    assert all(sorted(seen) == sorted(once) for seen in passes)
    assert all(passes[n] != passes[n - 1] for n in range(3)), "each in an order of its own"


def test_labels_are_the_tokens_themselves(tmp_path: Path, tokenizer: Any) -> None:
    mix = mixture({**numbered(tmp_path, "x", 10), "proportion": 1})
    row = next(iter(training_stream(mix, tokenizer, root=tmp_path, seed=0)))
    assert row["labels"] == row["input_ids"]


def test_documents_kept_for_measuring_never_reach_training(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", rows(*["a" * 30] * 20, *["b" * 30] * 5))
    source = {"name": "x", "path": "x.jsonl", "proportion": 1, "skip_last": 5}
    drawn = draw(tmp_path, tokenizer, mixture(source), 0, 100)
    assert not any("b" in tokenizer.decode(ids) for ids in drawn)


def test_a_source_shorter_than_a_sequence_is_refused_before_anything_is_drawn(
    tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path / "tiny.txt", "ab")
    mix = mixture(
        numbered(tmp_path, "x", 50), {"name": "tiny", "path": "tiny.txt", "proportion": 0.5}
    )
    with pytest.raises(
        TurboSparseError, match=r"source 'tiny' holds less than one sequence of 16 tokens; give"
    ):
        training_stream(mix, tokenizer, root=tmp_path, seed=0)


def test_a_fault_deep_in_a_source_names_its_line(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", rows(*["some words here"] * 30) + "{\n")
    mix = mixture({"name": "x", "path": "x.jsonl", "proportion": 1})
    with pytest.raises(TurboSparseError, match=r"x\.jsonl:31 is not valid JSON"):
        draw(tmp_path, tokenizer, mix, 0, 100)


def test_a_hub_data_set_that_cannot_be_opened_is_named(tmp_path: Path, tokenizer: Any) -> None:
    mix = mixture({"name": "web", "dataset": "nobody/nothing", "proportion": 1})
    with pytest.raises(
        TurboSparseError, match=r"source 'web': data set 'nobody/nothing' cannot be opened"
    ):
        training_stream(mix, tokenizer, root=tmp_path, seed=0)


def test_rows_of_a_hub_data_set_pass_through_the_template(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    table = [{"q": "what is it", "a": "a boat"}] * 9
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_kwargs: table)
    source = {"name": "web", "dataset": "org/set", "proportion": 1, "template": "{q}? {a}"}
    text = "".join(map(tokenizer.decode, draw(tmp_path, tokenizer, mixture(source), 0, 99)))
    assert "<s>what is it? a boat</s>" in text
    with pytest.raises(TurboSparseError, match=r"org/set:1 does not fit .*: the row has q, a"):
        draw(tmp_path, tokenizer, mixture({**source, "template": "{text}"}), 0, 1)


# --- sources that are not there, and documents that cannot be read --------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, sets: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Stand in for the hub: `sets` by name; any other is gated. Returns the calls."""
    import datasets

    calls = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        calls.append(((name, subset), options))
        if name not in sets:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' is a gated dataset")
        return sets[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def half_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    """Of four sources a file and a hub set are there, a file and a hub set are not."""
    hub(monkeypatch, {"org/there": [{"text": "some words"}] * 9})
    write(tmp_path / "here.jsonl", rows(*["some words"] * 9))
    return mixture(
        {"name": "here", "path": "here.jsonl", "proportion": 0.3},
        {"name": "moved", "path": "moved.jsonl", "proportion": 0.3},
        {"name": "there", "dataset": "org/there", "proportion": 0.1},
        {"name": "gated", "dataset": "org/gated", "proportion": 0.3},
    )


def test_all_missing_sources_are_named_at_once(tmp_path: Path, half_missing: Mixture) -> None:
    with pytest.raises(TurboSparseError) as failed:
        missing_sources(half_missing, tmp_path, allow_missing=False)
    message = str(failed.value)
    assert "\n" not in message
    for part in (
        "2 of 4 sources cannot be opened",
        f"(1) moved: no such file or folder: {tmp_path / 'moved.jsonl'}",
        "(2) gated: data set 'org/gated' cannot be opened (DatasetNotFoundError",
        "--allow-missing",
    ):
        assert part in message
    assert "here" not in message
    assert "org/there" not in message


def test_missing_sources_are_dropped_where_that_is_allowed(
    tmp_path: Path, half_missing: Mixture, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = missing_sources(half_missing, tmp_path, allow_missing=True)
    assert missing == ["moved", "gated"]
    rest = half_missing.without(missing)
    assert {s.name: s.proportion for s in rest.sources} == {
        "here": pytest.approx(0.75),
        "there": pytest.approx(0.25),
    }
    assert "without moved, gated: 60.00% of the mixture is missing" in capsys.readouterr().err
    none = half_missing.model_copy(update={"sources": half_missing.sources[1:2]})
    with pytest.raises(TurboSparseError, match="1 of 1 sources cannot be opened"):
        missing_sources(none, tmp_path, allow_missing=True)


def test_an_unreadable_source_is_not_missing(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", "{")
    mix = mixture({"name": "x", "path": "x.jsonl", "proportion": 1})
    assert missing_sources(mix, tmp_path, allow_missing=True) == []


@pytest.mark.parametrize("stand_in", ["web.jsonl", "web/part.jsonl"])
def test_local_files_stand_in_for_a_hub_set(tmp_path: Path, stand_in: str) -> None:
    write(tmp_path / stand_in, rows("local words"))
    source = Source(name=stand_in.split("/")[0], dataset="org/web", proportion=1)
    assert list(source.documents(tmp_path)) == ["local words"]


def test_a_folder_of_any_form_that_the_library_reads_is_a_data_set(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": f"document {n}", "kind": "ab"[n % 2]} for n in range(10)]
    for part in range(2):
        table = datasets.Dataset.from_list(rows[part * 5 :][:5])
        table.to_parquet(tmp_path / "set" / f"train-{part}.parquet")
    source = Source(name="x", dataset=str(tmp_path / "set"), proportion=1, where={"kind": ["b"]})
    everything = [row["text"] for row in rows if row["kind"] == "b"]
    assert list(source.documents(tmp_path)) == everything
    of = source.parts(tmp_path)
    assert of == 2
    parts = [list(source.documents(tmp_path, part=part, of=of)) for part in range(of)]
    assert list(chain.from_iterable(parts)) == everything


def test_rows_are_kept_by_a_nested_field(tmp_path: Path) -> None:
    kinds = ["A", "B", None, "C"]
    lines = [{"text": f"t{n}", "meta": {"set": kind}} for n, kind in enumerate(kinds)]
    lines.append({"text": "bare", "meta": None})
    write(tmp_path / "x.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    source = Source(name="x", path="x.jsonl", proportion=1, where={"meta.set": ["A", "C"]})
    assert list(source.documents(tmp_path)) == ["t0", "t3"]


def test_files_of_a_data_set_are_opened_by_their_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = hub(monkeypatch, {form: [{"text": "a"}] for form in ("json", "parquet")})
    for pattern in ("data/*.json.gz", "c/*.parquet"):
        source = Source(name="x", dataset="org/set", proportion=1, files=[pattern])
        assert list(source.documents(tmp_path)) == ["a"]
    assert [call[0][0] for call in calls] == ["json", "parquet"]
    assert calls[0][1]["data_files"] == {"train": ["hf://datasets/org/set/data/*.json.gz"]}


def broken_stream(good: int) -> Iterator[dict[str, str]]:
    yield from [{"text": "some words"}] * good
    raise ConnectionError("reset\nby peer")


@pytest.mark.parametrize(
    ("good", "message"),
    [(0, "'web': data set 'org/web' cannot be opened"), (3, "'web': .* broke off after row 3")],
)
def test_a_hub_stream_that_breaks_off_names_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, message: str
) -> None:
    hub(monkeypatch, {"org/web": broken_stream(good)})
    source = Source(name="web", dataset="org/web", proportion=1)
    with pytest.raises(TurboSparseError, match=message):
        list(source.documents(tmp_path))


BROKEN = {
    "broken UTF-8": ("x.jsonl", rows("a").encode() + b'{"text": "\xff"}\n' + rows("b").encode(), 2),
    "broken JSON": ("x.jsonl", rows("a") + '{"text"\n' + rows("b"), 2),
    "other fields": ("x.jsonl", rows("a") + '{"body": 1}\n' + rows("b"), 2),
    "no fields": ("x.jsonl", rows("a") + "3\n" + rows("b"), 2),
    "half a character": ("x.jsonl", rows("a") + '{"text": "\\ud800"}\n' + rows("b"), 2),
    "huge number": ("x.jsonl", rows("a") + '{"text": ' + "9" * 5000 + "}\n" + rows("b"), 2),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_unreadable_rows_are_refused_or_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    name, content, line = BROKEN[fault]
    write(tmp_path / name, content)
    source = Source(name="x", path=name, proportion=1)
    with pytest.raises(TurboSparseError, match=rf"x\.jsonl:{line} "):
        list(source.documents(tmp_path))
    source.skip_unreadable = True
    skips = Skips()
    for _ in range(2):  # a second time through the source is not counted
        assert list(source.documents(tmp_path, fault=skips.fault(source))) == ["a", "b"]
    skips.report()
    said = capsys.readouterr().err
    assert f"source 'x': skipped 1 unreadable; {tmp_path / name}:{line} " in said


def test_what_follows_a_broken_gzip_member_is_left_out(tmp_path: Path) -> None:
    first, second = (gzip.compress(rows(*texts).encode()) for texts in ("ab", "cd"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.jsonl.gz").write_bytes(first + second[:14] + b"\xff\xff" + second[16:])
    write(tmp_path / "x" / "2.txt", b"caf\xe9")
    write(tmp_path / "x" / "3.txt", "last")
    source = Source(name="x", path="x", proportion=1)
    with pytest.raises(TurboSparseError, match=r"1\.jsonl\.gz after line \d is a broken gzip"):
        list(source.documents(tmp_path))
    source.skip_unreadable = True
    skips = Skips()
    found = list(source.documents(tmp_path, fault=skips.fault(source)))
    assert (found[:2], found[-1]) == (["a", "b"], "last")
    assert len(skips["x"]) == 2


def test_a_source_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", "{\n{\n")
    source = Source(name="x", path="x.jsonl", proportion=1, skip_unreadable=True)
    with pytest.raises(TurboSparseError, match="source 'x' holds no text"):
        list(source.documents(tmp_path, fault=Skips().fault(source)))


def test_the_stream_counts_what_it_passes_over(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", rows(*["some words here"] * 30) + "{\n" + rows("more"))
    mix = mixture({"name": "x", "path": "x.jsonl", "proportion": 1, "skip_unreadable": True})
    skips = Skips()
    stream = training_stream(mix, tokenizer, root=tmp_path, seed=0, skips=skips)
    assert len(list(islice(stream, 100))) == 100
    assert len(skips["x"]) == 1
