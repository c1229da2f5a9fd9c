"""Prepared data: the same mixture from mapped files, whole or refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import run

from turbosparse import cli
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_tokenizer
from turbosparse.prepare import Prepared, prepare
from turbosparse.train import train
from turbosparse.training import prepared
from turbosparse.training.mixture import Skips, packed_sequences
from turbosparse.training.prepared import MANIFEST, found_mixture, training_data
from turbosparse.training.recipe import read_recipe, tokenizer_of

LENGTH, BATCH, STEPS = 16, 4, 6
Dense = Callable[[str], Path]
Write = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, dense: Dense) -> Write:
    """recipe(**changes): a recipe with 3/4 of `x` (a folder of three files) and 1/4 of `y`."""
    for part in range(3):
        file = tmp_path / "x" / f"{part}.jsonl"
        file.parent.mkdir(exist_ok=True)
        texts = [f"x {part} {n} {n * n}" for n in range(40 + 10 * part)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [[("user", f"y {n}?"), ("assistant", f"y {n * n}.")] for n in range(30)]
    turns = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))

    def write(**changes: Any) -> Path:
        data = {
            "sources": [
                {"name": "x", "path": "x", "proportion": 0.75},
                {"name": "y", "path": "y.jsonl", "proportion": 0.25, "format": "chat"},
            ],
            "sequence_length": LENGTH,
        }
        fields = {
            "model": str(dense("mistral")),
            "activation": "drelu",
            "data": data | changes.pop("data", {}),
            "tokens": STEPS * BATCH * LENGTH,
            "batch_size": BATCH,
            "micro_batch_size": 2,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "log_every": 2,
            "checkpoint_every": 2,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def sequences(recipe: Path, folder: Path, **overrides: Any) -> list[dict[str, list[int]]]:
    """What training with the prepared folder would see."""
    settings = read_recipe(recipe, **overrides)
    settings.data = found_mixture(settings.data, folder, allow_missing=True)
    found = training_data(settings, tokenizer_of(settings), root=folder, skips=Skips())
    rows = [found[n] for n in range(len(found))]
    return [{key: value.tolist() for key, value in row.items()} for row in rows]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def made(recipe: Write, tmp_path: Path) -> Path:
    prepare(recipe(), out=tmp_path / "made", processes=1)
    return tmp_path / "made"


def test_every_sequence_of_every_source_is_there_once_per_pass(
    recipe: Write, made: Path, tmp_path: Path
) -> None:
    assert [file.name for file in shards_of(made)] == [
        "x-0000.arrow",
        "x-0001.arrow",
        "x-0002.arrow",
        "y-0000.arrow",
    ]
    path = recipe()
    settings = read_recipe(path)
    tokenizer = tokenizer_of(settings)
    expected: dict[str, list[Any]] = {}
    for source in settings.data.sources:
        of = source.parts(tmp_path)
        expected[source.name] = [
            (row["input_ids"], row["labels"])
            for part in range(of)
            for row in packed_sequences(
                source.documents(tmp_path, part=part, of=of), tokenizer, LENGTH, append_eos=True
            )
        ]
    # far more than there is: each pass goes through everything in a new order
    rows = sequences(path, made, tokens=2000 * LENGTH)
    drawn = [(row["input_ids"], row["labels"]) for row in rows]
    for name, found in expected.items():
        mine = [row for row in drawn if row in found]
        passes = [mine[n : n + len(found)] for n in range(0, len(mine), len(found))]
        assert len(passes) > 3
        assert all(sorted(one) == sorted(found) for one in passes[:-1])
        assert passes[0] != found != passes[1] != passes[0], name
    share = sum(row in expected["x"] for row in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=4 * sqrt(0.75 * 0.25 / len(drawn)))


def test_the_seed_decides_the_order_and_more_tokens_continue_it(recipe: Write, made: Path) -> None:
    path = recipe()
    first = sequences(path, made, seed=3)
    assert sequences(path, made, seed=3) == first
    assert sequences(path, made, seed=4) != first
    assert sequences(path, made, seed=3, tokens=50 * BATCH * LENGTH)[: len(first)] == first


def test_the_result_counts_what_there_is_and_what_is_drawn(recipe: Write, tmp_path: Path) -> None:
    with (tmp_path / "x" / "0.jsonl").open("a") as file:
        file.write("{\n")
    path = recipe()
    fields = yaml.safe_load(path.read_text())
    fields["data"]["sources"][0]["skip_unreadable"] = True
    path.write_text(yaml.safe_dump(fields))
    done = prepare(path, out=tmp_path / "made", processes=1)
    rows = sequences(path, tmp_path / "made")
    x, y = done.sources
    plain = sum(row["labels"] == row["input_ids"] for row in rows)
    assert x["drawn"] == pytest.approx(plain / len(rows))
    assert (x["asked"], y["asked"], x["unreadable"]) == (0.75, 0.25, 1)
    assert done.tokens == x["tokens"] + y["tokens"]
    assert x["passes"] == pytest.approx(plain / (x["tokens"] / LENGTH))
    assert f"x: {x['tokens']:,} tokens; asked 75.00%, drawn {x['drawn']:.2%}" in str(done)
    assert "; 1 unreadable" in str(done)


def test_several_processes_write_the_same_files(recipe: Write, made: Path, tmp_path: Path) -> None:
    prepare(recipe(), out=tmp_path / "many", processes=3)
    assert contents(tmp_path / "many") == contents(made)


def test_jobs_that_share_a_folder_write_the_same_files(
    recipe: Write, made: Path, tmp_path: Path
) -> None:
    path, out = recipe(), tmp_path / "jobs"
    for number in (2, 0, 1):  # four files among three jobs, in any order
        done = prepare(path, out=out, processes=1, shard=f"{number}/3")
        assert f"shard {number}/3: {1 + (number == 0)} files of" in str(done)
        (out / ".x-0001.arrow.123").write_bytes(b"half")  # of a job that is running, or was killed
    with pytest.raises(TurboSparseError, match="jobs is not prepared to its end"):
        found_mixture(read_recipe(path).data, out, allow_missing=False)
    with pytest.raises(TurboSparseError, match=r"was begun with other settings \(tokens\)"):
        prepare(path, out=out, tokens=99999, shard="0/3")
    whole = {file: file.stat().st_ino for file in shards_of(out)}
    prepare(path, out=out, processes=1)
    assert contents(out) == contents(made)
    assert {file: file.stat().st_ino for file in shards_of(out)} == whole


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(recipe: Write, tmp_path: Path, shard: str) -> None:
    with pytest.raises(TurboSparseError, match="give I/N with I from 0 to N-1"):
        prepare(recipe(), out=tmp_path / "made", shard=shard)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_goes_on_with_what_is_whole(
    recipe: Write, made: Path, tmp_path: Path, processes: int
) -> None:
    path, out = recipe(), tmp_path / "killed"
    code = f"""
import os, signal, sys
from pathlib import Path
from turbosparse import prepare as module
if __name__ == "__main__":
    save, count = module._save, 0
    def kill(*arguments, **named):
        global count
        count += 1
        save(*arguments, **named)
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    module._save = kill
    module.prepare(Path({str(path)!r}), out=Path({str(out)!r}), processes={processes})
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    assert subprocess.run([sys.executable, script], capture_output=True).returncode == -9
    time.sleep(0.5 * (processes - 1))  # the others notice that they are alone
    assert not json.loads((out / MANIFEST).read_text())["complete"]
    with pytest.raises(TurboSparseError, match="killed is not prepared to its end; give the same"):
        train(path, data=out, out=tmp_path / "model")
    (out / ".x-0001.arrow.123").write_bytes(b"half")
    whole = {file: file.stat().st_ino for file in shards_of(out)}
    assert whole
    prepare(path, out=out, processes=processes)
    listed = json.loads((out / MANIFEST).read_text())["shards"]
    assert contents(out) == contents(made)
    assert len(listed) == 4
    kept = [file for file, inode in whole.items() if file.stat().st_ino == inode]
    assert kept, "what was whole is not written again"


def test_a_fault_in_one_process_is_one_line_and_ends_the_others(
    recipe: Write, tmp_path: Path
) -> None:
    path = recipe()
    with (tmp_path / "x" / "2.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(TurboSparseError, match=r"2\.jsonl:61 is not valid JSON"):
        prepare(path, out=tmp_path / "made", processes=2)
    (tmp_path / "x" / "2.jsonl").write_text('{"text": "mended, and long enough"}\n')
    prepare(path, out=tmp_path / "made", processes=2)


def test_a_folder_of_another_request_is_left_alone(recipe: Write, made: Path) -> None:
    before = contents(made)
    for changes, named in (
        ({"data": {"sequence_length": 32}}, "sequence_length"),
        ({"tokens": 99999}, "tokens"),
        ({"data": {"append_eos": False}}, "append_eos"),
    ):
        with pytest.raises(TurboSparseError, match=rf"was begun with other settings \({named}\)"):
            prepare(recipe(**changes), out=made)
    assert contents(made) == before
    (made / MANIFEST).unlink()
    with pytest.raises(TurboSparseError, match="made exists already"):
        prepare(recipe(), out=made)


# --- training from it -----------------------------------------------------------------------------


def test_training_sees_it_in_order_and_a_stopped_run_goes_on_exactly(
    recipe: Write,
    made: Path,
    tmp_path: Path,
    batches: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turbosparse.training.trainer import SparseTrainer

    path = recipe()
    train(path, data=made, out=tmp_path / "whole")
    assert torch.cat(batches).tolist() == [row["input_ids"] for row in sequences(path, made)]

    step, count = SparseTrainer.training_step, iter(range(100))

    def stop(self: Any, *arguments: Any) -> Any:
        if next(count) == 9:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(path, data=made, out=tmp_path / "out")
    stopped = len(batches)
    train(path, data=made, out=tmp_path / "out")
    assert torch.equal(torch.cat(batches[stopped:]), torch.cat(batches[8:12]))
    for name in ("training_log.jsonl", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_see_what_one_sees(recipe: Write, made: Path, tmp_path: Path) -> None:
    path = recipe(log_every=1)
    train(path, data=made, out=tmp_path / "one")
    script = tmp_path / "two.py"
    words = ["turbosparse", "train", path, "--data", made, "--out", tmp_path / "two"]
    script.write_text(
        f"import sys\nfrom turbosparse import cli\nsys.argv = {[*map(str, words)]}\ncli.main()\n"
    )
    run(script, 2)
    logs = [(tmp_path / name / "training_log.jsonl").read_text() for name in ("one", "two")]
    one, two = ([json.loads(line)["loss"] for line in log.splitlines()] for log in logs)
    assert two == pytest.approx(one, rel=1e-3)


def test_a_recipe_may_name_the_folder(
    recipe: Write, made: Path, tmp_path: Path, batches: list[torch.Tensor]
) -> None:
    path = recipe(data={"prepared": "made"}, tokens=BATCH * LENGTH)
    for file in (tmp_path / "x").iterdir():
        file.unlink()
    train(path, out=tmp_path / "out")
    assert torch.cat(batches).tolist() == [row["input_ids"] for row in sequences(path, made)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"sequence_length": 32}}, "sequence_length"),
        ({"data": {"append_eos": False}}, "append_eos"),
        (
            {"data": {"sources": [{"name": "x", "path": "x", "proportion": 1}]}},
            "sources, tokenizer",
        ),
        ({"model": "qwen2"}, "tokenizer"),
    ],
)
def test_it_must_be_of_the_same_tokenizer_length_and_mixture(
    recipe: Write, made: Path, tmp_path: Path, dense: Dense, changes: dict[str, Any], named: str
) -> None:
    if "model" in changes:
        changed = load_tokenizer(dense("mistral"))
        changed.add_tokens(["boats"])
        changed.save_pretrained(tmp_path / "other")
        changes = {"tokenizer": str(tmp_path / "other")}
    with pytest.raises(TurboSparseError, match=rf"with other settings \({named}\) than the recipe"):
        train(recipe(**changes), data=made, out=tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gone", r"x-0001\.arrow has 0 bytes instead of \d+; delete it and give the same"),
        ("cut", r"x-0001\.arrow has 1000 bytes instead of \d+; delete it"),
        ("head", r"x-0001\.arrow is corrupt \(.*\); delete it"),
        ("one bit", r"x-0001\.arrow is corrupt: sequence \d+ is not what was written; delete it"),
    ],
)
def test_a_broken_shard_is_named_and_written_anew(
    recipe: Write, made: Path, damage: str, message: str
) -> None:
    whole = contents(made)
    file = made / "x-0001.arrow"
    raw = bytearray(file.read_bytes())
    if damage == "head":
        raw[:64] = b"\xff" * 64
    elif damage == "one bit":
        rows = prepared._File(file, len(raw)).rows.data.column("input_ids").combine_chunks()
        first = rows.flatten().to_numpy()[:LENGTH].tobytes()
        raw[raw.index(first) + 5] ^= 1
    file.write_bytes(raw[:1000] if damage == "cut" else raw)
    if damage == "gone":
        file.unlink()
    with pytest.raises(TurboSparseError, match=message) as failed:
        sequences(recipe(), made, tokens=400 * LENGTH)
    assert "\n" not in str(failed.value).strip()
    file.unlink(missing_ok=damage == "gone")
    prepare(recipe(), out=made)
    assert contents(made) == whole


def test_a_hub_set_is_read_only_as_far_as_training_needs(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    read = Counter()

    def rows(shards: list[int]) -> Any:
        for shard in shards:
            for number in range(1000):
                read[shard] += 1
                yield {"text": f"{shard} {number} some words"}

    from datasets.iterable_dataset import ExamplesIterable

    def keyed(shards: list[int]) -> Any:
        yield from enumerate(rows(shards))

    stream = datasets.IterableDataset(ExamplesIterable(keyed, {"shards": [0, 1, 2]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: stream)
    sources = [{"name": "web", "dataset": "org/web", "proportion": 1}]
    path = recipe(data={"sources": sources})
    done = prepare(path, out=tmp_path / "made", processes=1)
    need = STEPS * BATCH
    assert need <= done.tokens // LENGTH < 3 * need
    assert len(shards_of(tmp_path / "made")) == 3
    assert all(0 < count < 100 for count in read.values())
    with pytest.raises(TurboSparseError, match="holds only the beginning of web; the recipe wants"):
        sequences(path, tmp_path / "made", tokens=2 * need * LENGTH)


def test_missing_sources_stay_missing(
    recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    (tmp_path / "y.jsonl").unlink()
    with pytest.raises(TurboSparseError, match="1 of 2 sources cannot be opened"):
        prepare(path, out=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    done = prepare(path, out=tmp_path / "made", processes=1, allow_missing=True)
    assert done.missing == ["y"]
    assert done.sources[0]["asked"] == 1
    assert "y: missing" in str(done)
    with pytest.raises(TurboSparseError, match="was prepared without y; prepare another"):
        train(path, data=tmp_path / "made", out=tmp_path / "out")
    with pytest.raises(TurboSparseError, match="1 of 2 sources cannot be opened"):
        train(path, out=tmp_path / "out")
    assert not (tmp_path / "out.training").exists()
    for data in (tmp_path / "made", None):
        capsys.readouterr()
        train(path, data=data, out=tmp_path / f"{data is None}", allow_missing=True)
        assert "without y: 25.00% of the mixture is missing" in capsys.readouterr().err
        kept = json.loads((tmp_path / f"{data is None}" / "recipe.json").read_text())
        assert [s["name"] for s in kept["data"]["sources"]] == ["x"]


def test_a_source_without_one_sequence_is_refused(recipe: Write, tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "y.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(TurboSparseError, match="source 'y' holds less than one sequence of 16"):
        prepare(path, out=tmp_path / "made", processes=1)


# --- the verb -------------------------------------------------------------------------------------


def test_the_verb_prints_json_and_touches_no_cache(recipe: Write, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    words = ["data", "prepare", recipe(), "--out", tmp_path / "made", "--processes", "2", "--json"]
    run = subprocess.run(
        [Path(sys.executable).with_name("turbosparse"), *words],
        env={**clean, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    result = json.loads(run.stdout.splitlines()[-1])
    assert Prepared(**result).sources[0]["source"] == "x"
    assert not list(home.rglob("*"))


def test_a_signal_ends_every_process(recipe: Write, tmp_path: Path) -> None:
    with (tmp_path / "x" / "0.jsonl").open("a") as file:
        file.write((json.dumps({"text": "words " * 50}) + "\n") * 100_000)
    words = ["data", "prepare", recipe(), "--out", tmp_path / "made", "--processes", "2"]
    entry = Path(sys.executable).with_name("turbosparse")
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background does not
    with subprocess.Popen(
        [entry, *words], stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed
    ) as run:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "made").glob(".x-0000.arrow.*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        assert run.stderr.read() == b"turbosparse: interrupted\n"
        assert run.wait() == 130
    for _ in range(100):  # the last of them may still be on their way out
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left")


def test_the_group_explains_its_verbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words in (["data"], ["data", "prepare", "--help"]):
        monkeypatch.setattr(sys, "argv", ["turbosparse", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, _ = capsys.readouterr()
        assert stop.value.code == 0
        assert "prepare" in out
    assert "--allow-missing" in out
