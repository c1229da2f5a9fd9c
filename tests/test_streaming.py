"""Models larger than memory: the same tokens from disk, faults of files, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Shared
from serving import Running, serving

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import size_in_bytes
from turbosparse.benchmark import disk
from turbosparse.benchmark.harness import Memory
from turbosparse.engine import streaming
from turbosparse.engine.engine import Engine
from turbosparse.engine.streaming import Placement
from turbosparse.generate import generate
from turbosparse.pack import pack
from turbosparse.packed.format import Packed
from turbosparse.packed.header import FormatError
from turbosparse.packed.synthetic import SHAPES, Wanted, make_synthetic
from turbosparse.plan import plan

Folder = Callable[[str], Path]
PROMPT, TOKENS = list(range(20, 60)), 8
MEMORY = 380 << 20  # of the process that is measured


@pytest.fixture(scope="session")
def with_signs(sparse: Callable[..., Path], shared: Shared) -> Folder:
    """with_signs(family): a packed toy model with a predictor; do not write into it."""

    def folder(family: str) -> Path:
        make = partial(pack, str(sparse(family)), quant="q4", predictor="sign")
        return shared(f"streamed-{family}", make)

    return folder


@pytest.fixture
def a_few_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """a_few_units(gates_stay): engines with a limit get the smallest caches that can work."""

    def patch(gates_stay: bool) -> None:
        def smallest(packed: Packed, memory: int, _: Any, threads: int, __: Any) -> Placement:
            kinds = ("bundles",) if packed.header.bundled else ("gate", "pairs")[gates_stay:]
            least = streaming._least(packed, kinds, threads)
            return Placement(memory, 1, 1 << 26, 1, kinds, least, 1)

        monkeypatch.setattr("turbosparse.engine.engine.place", smallest)

    return patch


def text(engine: Engine) -> tuple[list[int], np.ndarray[Any, Any]]:
    """A greedy text and its logits."""
    sequence, logits = engine.sequence(PROMPT), []
    for _ in range(TOKENS):
        (step,) = engine.step([sequence])
        logits.append(step.logits)
        sequence.extend([int(step.logits.argmax())])
    return sequence.tokens, np.stack(logits)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("family", ["mistral", "mixtral", "nemotron"])
def test_the_text_is_that_in_memory_to_the_last_bit(
    with_signs: Folder, a_few_units: Callable[[bool], None], family: str, mode: Any, threads: int
) -> None:
    folder = with_signs(family)
    tokens, logits = text(Engine(folder, mode=mode, threads=threads))
    for gates_stay in (False, True):
        a_few_units(gates_stay)
        engine = Engine(folder, mode=mode, threads=threads, memory="1MB")
        found = text(engine)
        assert found[0] == tokens
        np.testing.assert_array_equal(found[1], logits)
        assert engine.stores
        _, missed, reads, size, _ = engine.stores.take_counts()
        assert missed >= reads > 0
        assert size > 0


@pytest.mark.parametrize("family", ["mistral", "mixtral", "nemotron"])
def test_bundles_give_the_same_text_in_memory_and_from_disk(
    with_signs: Folder,
    sparse: Callable[..., Path],
    a_few_units: Callable[[bool], None],
    tmp_path: Path,
    family: str,
) -> None:
    apart = with_signs(family)
    pack(str(sparse(family)), tmp_path / "bundled", quant="q4", predictor="sign", bundle=True)
    Packed(tmp_path / "bundled").verify()
    a_few_units(False)
    for mode in ("dense", "exact", "predicted"):
        tokens, logits = text(Engine(apart, mode=mode, threads=2))
        for memory in (None, "1MB"):
            engine = Engine(tmp_path / "bundled", mode=mode, threads=2, memory=memory)
            found = text(engine)
            assert found[0] == tokens
            np.testing.assert_array_equal(found[1], logits)
        assert engine.stores
        found, missed, reads, *_ = engine.stores.take_counts()
        assert missed >= reads > 0, "they came from disk"
        both = [Engine(each, mode=mode, backend="torch") for each in (apart, tmp_path / "bundled")]
        np.testing.assert_array_equal(*(text(engine)[1] for engine in both))


def test_a_server_answers_from_disk_as_from_memory(
    with_signs: Folder, a_few_units: Callable[[bool], None]
) -> None:
    folder = with_signs("mistral")

    def ask(running: Running, seed: int) -> str:
        body = {"prompt": "The boats", "max_tokens": 12, "temperature": 1.0, "seed": seed}
        answer = httpx.post(f"{running.address}/v1/completions", json=body).json()
        return str(answer["choices"][0]["text"])

    def answers(memory: int | None) -> list[str]:
        with serving(folder, memory=memory) as running, ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(partial(ask, running), range(4)))
            (served,) = running.server.models.open
            assert bool(served.engine.stores) == bool(memory)
        return texts

    in_memory = answers(None)
    a_few_units(False)
    assert answers(1000) == in_memory
    assert len(set(in_memory)) > 1


def test_what_was_expected_stands_beside_what_was_reached(
    tmp_path: Path,
    with_signs: Folder,
    a_few_units: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(disk, "SECONDS", 0.001)
    monkeypatch.setattr(Memory, "read_speed", lambda _: 10.0)
    folder = tmp_path / "model"
    shutil.copytree(with_signs("mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["turbosparse"]["profile"] = {
        "tokens": 100,
        "nats_per_token": 2.0,
        "active": [[0.1]] * layers,
        "gate_positive": [[0.3]] * layers,
        "expert_tokens": [[100]] * layers,
        "windows": {1: 0.1, 8: 0.3, 256: 0.9},
    }
    (folder / "config.json").write_text(json.dumps(config))
    a_few_units(False)
    unknown = generate(folder, "The", max_tokens=2, threads=1, memory="1MB")
    assert unknown.expected is None
    planned = plan(folder, memory="60GiB", threads=1)
    assert planned.neurons == "as the packed folder has it"
    known = generate(folder, "The", max_tokens=2, threads=1, memory="1MB")
    assert known.expected
    assert f"({known.expected:.2g} expected)" in str(known)
    assert generate(folder, "The", max_tokens=2, threads=1).expected is None


def test_rows_that_were_replaced_stay_as_they_were(
    tmp_path: Path, with_signs: Folder, a_few_units: Callable[[bool], None]
) -> None:
    """A new file under the name is another file; one that is written into is an error."""
    folder = tmp_path / "model"
    shutil.copytree(with_signs("mistral"), folder)
    a_few_units(False)
    engine = Engine(folder, threads=1, memory="1MB")
    tokens, _ = text(engine)
    (file,) = folder.glob("*.safetensors")
    shutil.copy(file, tmp_path / "other")
    (tmp_path / "other").replace(file)
    assert text(engine)[0] == tokens
    engine = Engine(folder, threads=1, memory="1MB")
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(FormatError, match="changed"):
        text(engine)


def test_a_file_that_changes_during_a_pass_gives_no_token(
    tmp_path: Path,
    with_signs: Folder,
    a_few_units: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_signs("mistral"), folder)
    a_few_units(True)
    engine = Engine(folder, threads=1, memory="1MB")
    (file,) = folder.glob("*.safetensors")
    step = engine.decoder.step

    def late(*arguments: Any, **settings: Any) -> Any:
        found = step(*arguments, **settings)
        file.touch()
        return found

    monkeypatch.setattr(engine.decoder, "step", late)
    with pytest.raises(FormatError, match="changed"):
        text(engine)

    def cut(*arguments: Any, **settings: Any) -> Any:
        os.truncate(file, 4096)
        return step(*arguments, **settings)

    engine = Engine(folder, threads=1, memory="1MB")
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", cut)
    with pytest.raises(
        TurboSparseError, match=r"of \d+ bytes from byte \d+ on only 0 could be read"
    ):
        text(engine)


def test_a_read_that_fails_is_named_and_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(bytes(range(256)) * 64)
    descriptor = os.open(file, os.O_RDWR)
    store = _core.Store(8192, 512, 2, 2)
    rows = store.add(descriptor, 4096, 24, 512)
    some = np.array([0, 1, 5, 23], np.int32)
    rows.fetch(some)
    assert store.take_counts()[:4] == (0, 3, 1, 12288)  # what lies between is read and dropped
    os.truncate(file, 4096 + 3000)
    late = np.array([4, 6, 8], np.int32)
    with pytest.raises(_core.ReadError, match="of 2048 bytes from byte 7168 on only 0"):
        rows.fetch(np.array([6, 8], np.int32))
    os.truncate(file, 1 << 14)
    rows.fetch(late)
    os.dup2(os.open(tmp_path, os.O_RDONLY), descriptor)
    with pytest.raises(_core.ReadError, match="directory"):
        rows.fetch(np.array([12], np.int32))
    with pytest.raises(ValueError, match="0 to 23"):
        rows.fetch(np.array([24], np.int32))
    with pytest.raises(ValueError, match="do not fit"):
        rows.fetch(np.arange(24, dtype=np.int32))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 mb", 1_500_000), ("2G", 2 * 10**9), (77, 77), ("64KiB", 64 << 10)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert size_in_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "8 boats", "-1", "0", "GiB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(TurboSparseError, match="--memory"):
        size_in_bytes(text, "--memory")


def test_a_model_that_fits_stays_in_memory(with_signs: Folder) -> None:
    engine = Engine(with_signs("mistral"), threads=1, memory="60GiB")
    assert engine.stores is None
    with pytest.raises(TurboSparseError, match="give at least"):
        Engine(with_signs("mistral"), threads=1, memory="100MB")
    with pytest.raises(TurboSparseError, match="needs the cpu backend"):
        Engine(with_signs("mistral"), backend="torch", memory="1GB")


@pytest.fixture(scope="session")
def large(shared: Shared) -> Path:
    """A packed model of more than 200 MB, nearly all feed-forwards."""

    def make(folder: Path) -> None:
        fields = SHAPES["llama-15m"] | {"hidden_size": 1024, "num_attention_heads": 8}
        fields |= {"intermediate_size": 24576, "num_hidden_layers": 5, "vocab_size": 512}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHAPES, "wide", fields | {"num_key_value_heads": 8})
            make_synthetic(folder, Wanted("wide", predictor="sign"), quant="q4")

    return shared("large", make)


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A group of version 1 with this memory limit below that of the tests; None where denied."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if ":memory:" in line), "")
    group = Path(f"/sys/fs/cgroup/memory{own}/turbosparse-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


PROGRAM = """
import sys
from turbosparse.engine.engine import Engine
engine = Engine(sys.argv[1], mode="predicted", threads=1, memory=int(sys.argv[2]))
assert engine.stores
sequence = engine.sequence(range(8))
while True:
    engine.step([sequence])
    print(len(sequence.tokens), flush=True)
    sequence.extend([len(sequence.tokens) * 7])
"""


def test_memory_is_bounded_and_a_killed_process_leaves_nothing(tmp_path: Path, large: Path) -> None:
    def left() -> list[Path]:  # beside it, other tests write what they share
        return sorted([*large.parent.glob(f"*{large.name}*"), *large.rglob("*")])

    before = left()
    with control_group(MEMORY) as group:
        into = (lambda: (group / "cgroup.procs").write_text("0")) if group else None
        command = [sys.executable, "-c", PROGRAM, str(large), str(MEMORY)]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=into,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if int(line) > 40:
                    break
            about = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next(int(line.split()[1]) for line in about if line.startswith("VmHWM"))
            process.send_signal(signal.SIGKILL)
        assert peak << 10 < MEMORY
        if group:
            assert int((group / "memory.max_usage_in_bytes").read_text()) < MEMORY
            assert int((group / "memory.failcnt").read_text()) == 0
    assert left() == before
    assert not list(tmp_path.iterdir())
