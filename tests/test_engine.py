"""What the engine makes of the machine: its processors and its memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model

import turbosparse
from turbosparse.base import machine
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import threads_to_use
from turbosparse.convert import convert
from turbosparse.pack import pack

QUOTAS = [
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "10000 100000\n"}, 1),
    ({"cpu.max": "400000 100000\n"}, 4),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "250000\n"}, None),
    ({"cpu.max": "nonsense\n"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "expected"), QUOTAS)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], expected: int | None):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._processor_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (2, 2), (9, 4)])
def test_threads_by_default(monkeypatch: pytest.MonkeyPatch, quota: int | None, expected: int):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(machine, "_processor_quota", lambda: quota)
    assert threads_to_use(None) == expected
    assert threads_to_use(4) == 4  # who asks may have more than the quota
    with pytest.raises(TurboSparseError, match="--threads 5: this process may use 1 to 4"):
        threads_to_use(5)


# Each of the 100 sequences needs a page of 2.1 MB.
STARVE = """
import re, resource, sys
from pathlib import Path
import numpy as np
from turbosparse.engine.engine import Engine
from turbosparse.base.errors import TurboSparseError

engine = Engine(sys.argv[1], threads=1)
tokens = [[1 + n] for n in range(100)]
caches = [engine.decoder.new_cache(engine.context) for _ in tokens]
in_use = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (in_use + (100 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        engine.decoder.step(tokens, caches, mode="exact")
    except TurboSparseError as error:
        print(error)
    assert [cache.length for cache in caches] == [0] * 100
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logits, _ = engine.decoder.step(tokens, caches, mode="exact")
for row, token in zip(logits, tokens):
    cache = engine.decoder.new_cache(engine.context)
    alone, _ = engine.decoder.step([token], [cache], mode="exact")
    assert np.array_equal(row, alone[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists()
    or resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    reason="needs /proc and address space without limit",
)
def test_a_step_without_memory_is_named_and_changes_nothing(tmp_path: Path):
    wide = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 1024}
    convert(str(make_model("mistral", tmp_path / "dense", **wide)), tmp_path / "sparse")
    pack(str(tmp_path / "sparse"), tmp_path / "packed", quant="q8")
    command = [sys.executable, "-c", STARVE, tmp_path / "packed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = (
        "out of memory in a step of 100 tokens: 100 positions need 209.7 MB of key-value cache; "
        "use a shorter prompt or fewer sequences\n"
    )
    assert done.stdout == 2 * expected


# --- the engine for programs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(packed_mistral: Path) -> Path:
    return packed_mistral


def test_generating_loads_neither_torch_nor_transformers(packed: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # importing either fails
        "import turbosparse\n"
        "model = turbosparse.load(sys.argv[1], threads=1)\n"
        "print(repr(''.join(t.text for t in model.stream('The boats', max_tokens=5))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, packed], capture_output=True, text=True, check=True
    )
    expected = turbosparse.load(packed, threads=1).generate("The boats", max_tokens=5)
    assert done.stdout.strip() == repr(expected)


def test_two_threads_with_two_engines_write_what_one_does(packed: Path) -> None:
    alone = turbosparse.load(packed, threads=1).generate("The boats", max_tokens=40)
    models = [turbosparse.load(packed, threads=2) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda m: m.generate("The boats", max_tokens=40), models))
    assert texts == [alone, alone]


def test_a_cancelled_stream_ends_and_the_sequence_can_be_used_again(packed: Path) -> None:
    model = turbosparse.load(packed, threads=1)
    whole = model.generate("The boats", max_tokens=12)
    with model.new_sequence() as sequence:
        tokens = []
        for token in model.stream("The boats", sequence=sequence, max_tokens=40):
            tokens.append(token)
            if len(tokens) == 3:
                sequence.cancel()
        assert tokens[-1].finish == "cancelled"
        assert len(tokens) <= 4
        sequence.resume()
        again = model.stream("The boats", sequence=sequence, max_tokens=12)
        assert "".join(token.text for token in again) == whole


def test_a_fork_continues_on_its_own(packed: Path) -> None:
    engine = turbosparse.load(packed, threads=1).engine
    first = engine.sequence([5, 9, 40])
    engine.step([first])
    second = first.fork()
    first.extend([7])
    second.extend([8])
    apart = engine.step([first, second])
    fresh = [engine.step([engine.sequence([5, 9, 40, last])])[0] for last in (7, 8)]
    for one, other in zip(apart, fresh, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_forks_share_pages_until_they_write(packed: Path) -> None:
    """Within a page, at its border, and of a fork; whoever writes first, none sees the others."""
    engine = turbosparse.load(packed, threads=1).engine
    tokens = [n % 300 for n in range(130)]
    whole = engine.sequence(tokens)
    engine.step([whole])
    forks = [whole.fork(length) for length in (64, 70, 100, 128, 130)]
    forks += [forks[1].fork(), forks[2].fork(66)]
    for number, fork in enumerate([*forks[::2], whole, *forks[1::2]]):
        fork.extend([number, 7])
        fork_alone = engine.sequence(fork.tokens)
        np.testing.assert_array_equal(
            engine.step([fork])[0].logits, engine.step([fork_alone])[0].logits
        )
    for fork in [*forks, whole]:
        fork.extend([9])
        again = engine.step([engine.sequence(fork.tokens)])[0]
        np.testing.assert_array_equal(engine.step([fork])[0].logits, again.logits)


def test_a_dropped_cache_and_a_fork_of_a_part_are_read_again(packed: Path) -> None:
    engine = turbosparse.load(packed, threads=1).engine
    tokens = [n % 300 for n in range(100)]
    sequence = engine.sequence(tokens)
    expected = engine.step([sequence])[0].logits
    part = sequence.fork(70)
    assert (part.tokens, part.length, part.pending) == (tokens[:70], 70, [])
    used = engine.budget.used
    sequence.drop()
    assert engine.budget.used == used - engine.decoder.cache_bytes(100, engine.context)
    assert sequence.pending == tokens
    part.extend(tokens[70:])
    for step in engine.step([sequence, part]):
        np.testing.assert_allclose(step.logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pass_reads_what_it_is_told_and_shows_each_layer(packed: Path) -> None:
    engine = turbosparse.load(packed, threads=1).engine
    first, second = engine.sequence([5, 9, 40]), engine.sequence([7])
    steps = engine.advance([first, second], [2, 1])
    assert (first.length, first.pending, second.pending) == (2, [40], [])
    for step in steps:
        assert step.layers.shape == (engine.config.num_hidden_layers, 3)
        assert step.active == pytest.approx(step.layers[:, 2].mean())
        assert 0 < step.active <= step.gate_positive < step.candidates == 1


def test_a_full_budget_is_refused_and_changes_nothing(packed: Path) -> None:
    model = turbosparse.load(packed, threads=1, kv_bytes=100_000)
    with pytest.raises(TurboSparseError, match=r"key-value cache needs .* of 0\.1 MB are in use"):
        model.generate(["The boats went home. " * 4] * 12, max_tokens=60)
    assert model.engine.budget.used == 0
    assert len(model.generate("The", max_tokens=3)) > 0


def test_logits_that_are_not_finite_are_an_error(packed: Path) -> None:
    engine = turbosparse.load(packed, threads=1).engine
    step = engine.decoder.step

    def broken(*given: object, **named: object) -> object:
        logits, used = step(*given, **named)
        logits[0, 3] = np.nan
        return logits, used

    engine.decoder.step = broken
    with pytest.raises(TurboSparseError, match="the logits are not finite"):
        engine.step([engine.sequence([1, 2])])
