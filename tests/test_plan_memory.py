"""What is expected under a memory limit: the arithmetic of misses, and the verb that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turbosparse.base.errors import TurboSparseError
from turbosparse.benchmark import disk
from turbosparse.benchmark.disk import DEPTHS, SIZES, Disk, disk_of
from turbosparse.engine import expect as expecting
from turbosparse.engine.expect import Reading, expect, measured, walk
from turbosparse.engine.split import expect as expect_split
from turbosparse.engine.split import split
from turbosparse.engine.streaming import Placement
from turbosparse.packed.format import Packed
from turbosparse.packed.synthetic import SHAPES, Wanted, make_synthetic
from turbosparse.plan import plan

FLAT = Disk(list(SIZES), {depth: [1e4] * len(SIZES) for depth in DEPTHS})


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed mixture of experts whose pairs and gates are many units."""
    folder = tmp_path_factory.mktemp("planned") / "model"
    fields = SHAPES["mixtral-8x7b"] | {"vocab_size": 512, "hidden_size": 256}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "moe", fields | {"intermediate_size": 2048})
        make_synthetic(folder, Wanted("moe", predictor="sign"), quant="q8")
    return folder


def test_unions_begin_with_one_token_and_grow() -> None:
    found = walk(0.0, 8, 2)(0.1, 1)
    assert found[0] == pytest.approx(0.1 * 2 / 8, rel=0.1)
    assert found[1] == pytest.approx(1 - (1 - 0.025) ** 2, rel=0.1)
    assert walk(0.9, 8, 2)(0.1, 1)[9] < found[9]
    units = walk(0.0, 1, 1)(0.1, 4)
    assert units[0] == pytest.approx(1 - 0.9**4, rel=0.1)
    windows = measured({1: 0.025, 8: 0.1}, 0.25)(0.1, 1)
    assert (windows[0], windows[-1]) == (pytest.approx(0.025), pytest.approx(0.1))


def test_what_fits_is_not_missed_and_what_does_not_is_read(moe: Path) -> None:
    packed = Packed(moe)

    def of(cache: int) -> Any:
        where = Placement(1, 1, 1, 1, ("gate", "pairs"), cache, 1)
        settings = {"reading": Reading(1e9, 1e9), "read_seconds": lambda _: 1e-4}
        return expect(packed, where, "predicted", (0.1, 0.3, 0.1), walk(0.5, 8, 2), **settings)

    whole, half, little = of(1 << 30), of(10 << 20), of(2 << 20)
    assert (whole.found, whole.disk_seconds) == (1.0, 0.0)
    assert 1 > half.found > little.found >= 0
    assert half.disk_bytes < little.disk_bytes
    assert whole.tokens_per_second == pytest.approx(1e9 / whole.memory_bytes)


def test_near_units_share_a_read() -> None:
    assert expecting._joined(0, 100, 4096) == (0.0, 0.0)
    reads, size = expecting._joined(10, 1e9, 4096)
    assert (reads, size) == (pytest.approx(10), pytest.approx(40960))
    reads, size = expecting._joined(1000, 1000, 4096)
    assert (reads, size) == (pytest.approx(1000 * 4096 / (128 << 10)), pytest.approx(4096e3))


def test_the_disk_is_measured_once(
    tmp_path: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "SECONDS", 0.001)
    kept, packed = tmp_path / "disk.json", Packed(moe)
    kept.write_text("[damaged")
    first = disk_of(packed, cache=kept)
    assert [len(rates) for rates in first.reads.values()] == [len(SIZES)] * len(DEPTHS)
    assert min(min(rates) for rates in first.reads.values()) > 0
    assert disk_of(packed, cache=kept) == first
    assert disk_of(packed, cache=kept, again=True) != first


def test_the_verb(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbosparse.plan.disk_of", lambda *_, **__: FLAT)
    monkeypatch.setattr("turbosparse.plan.measure_reading", lambda *_: Reading(2e10, 1e10))
    whole = plan(moe, memory="60GiB", sparsity=0.9)
    assert whole.placement == "all of it in memory"
    assert whole.tokens_per_second > max(whole.others.values())
    least = plan(moe, target=whole.tokens_per_second, sparsity=0.9)
    assert least.memory < 4 << 30
    assert least.tokens_per_second >= whole.tokens_per_second
    for wrong, says in (
        ({}, "sparsity of .* is not known"),
        ({"sparsity": 0.9, "target": 1e9}, "more than this machine reaches"),
        ({"sparsity": 0.9, "target": 0.0}, "more than 0"),
        ({"sparsity": 0.9, "locality": 2.0}, "locality"),
        ({"sparsity": 0.9, "memory": "much"}, "no size"),
    ):
        with pytest.raises(TurboSparseError, match=says):
            plan(moe, **wrong)


def test_a_split_is_as_fast_as_what_takes_longer(moe: Path) -> None:
    packed, shares = Packed(moe), (0.1, 0.3, 0.1)
    weights, caches = sum(tensor.nbytes for tensor in packed.tensors.values()), 1 << 20
    whole = split(packed, weights + (1 << 28), caches)
    assert whole.hot == whole.neurons
    half = split(packed, (weights + whole.rest) // 2 + caches, caches)
    none = split(packed, whole.rest + caches, caches)
    assert 0 == none.hot < half.hot < half.neurons
    assert half.hot % 64 == 0
    speeds = {"card": 100e9, "link": 10e9, "memory": 10e9}
    for mode in ("dense", "exact", "predicted"):
        all_, some, least = (
            expect_split(packed, where, mode, shares, **speeds) for where in (whole, half, none)
        )
        plain = expect(
            packed,
            None,
            mode,
            shares,
            walk(0, 8, 2),
            reading=Reading(1e11, 1e11),
            read_seconds=lambda _: 0.0,
        )
        assert all_.card_bytes == pytest.approx(plain.memory_bytes)
        assert all_.tokens_per_second == pytest.approx(plain.tokens_per_second)
        assert (all_.memory_bytes, all_.link_seconds) == (0.0, 0.0)
        assert all_.tokens_per_second > some.tokens_per_second > least.tokens_per_second
        for one in (some, least):  # the processor takes longer
            rest = one.card_bytes + one.memory_bytes - all_.card_bytes
            assert rest == pytest.approx(0, abs=1)
            assert one.seconds >= one.memory_seconds + one.link_seconds
        fast = expect_split(packed, half, mode, shares, **speeds | {"memory": 1e15, "link": 1e15})
        assert fast.seconds == pytest.approx(fast.card_seconds)


def test_the_verb_for_a_card(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbosparse.plan.measure_reading", lambda *_: Reading(2e10, 1e10))
    card = {"gpu_bandwidth": 1008.0, "link_bandwidth": 25.0, "sparsity": 0.9}
    much, little = (plan(moe, gpu_memory=size, **card) for size in ("8GiB", "16MiB"))
    assert "2048 of 2048 neurons on it" in much.placement
    assert much.tokens_per_second > little.tokens_per_second
    assert set(little.others) | {little.expected["mode"]} == {"dense", "exact", "predicted"}
    assert little.disk is None
    for wrong, says in (
        ({"gpu_bandwidth": None}, "--gpu-memory needs --gpu-bandwidth"),
        ({"link_bandwidth": -1.0}, "--link-bandwidth, in GB/s and more than 0, not -1"),
        ({"memory": "8GiB"}, "--gpu-memory and --memory do not go together"),
        ({"locality": 0.5}, "--gpu-memory and --locality do not go together"),
        ({"gpu_memory": None}, "--gpu-bandwidth belongs to --gpu-memory"),
        ({"gpu_memory": "1MiB"}, "is too little for"),
    ):
        with pytest.raises(TurboSparseError, match=says):
            plan(moe, **{"gpu_memory": "8GiB"} | card | wrong)
