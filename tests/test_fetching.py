"""How rows are fetched ahead: never seen in a result, found once for a machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.ops import fetching
from turbosparse.ops.fetching import DEFAULT, WORTHWHILE, Fetching, Way
from turbosparse.ops.rows import QUANTS, row_bytes

FOUND = Fetching(Way("aside", 2, 0), Way("none", 1, 0), "measured")


@pytest.fixture(autouse=True)
def default_again() -> Iterator[None]:
    yield
    DEFAULT.use()


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each trial, all of which find the same."""
    tried: list[int] = []
    monkeypatch.delenv(fetching.VARIABLE, raising=False)
    monkeypatch.setattr(fetching, "measure", lambda threads: tried.append(threads) or FOUND)
    return tried


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("quant", QUANTS)
def test_every_way_gives_the_same_bits(isa: str, quant: str) -> None:
    before = _core.isa()
    _core.set_isa(isa)
    random = np.random.default_rng(0)
    rows, hidden, tokens = 203, 1056, 3
    weights = random.integers(0, 52, (2, rows, 2 * row_bytes(quant, hidden)), dtype=np.uint8)
    gates = np.ascontiguousarray(weights[0, :, : row_bytes(quant, hidden)])
    x = random.standard_normal((tokens, hidden), dtype=np.float32)
    some = np.flatnonzero(random.random(rows) < 0.3).astype(np.int32)
    results = set()
    for order, cache, size in product(("none", "stream", "aside"), (1, 2), (0, 5000)):
        Fetching(Way(order, cache, size), Way(order, cache, size)).use()
        product_, part = np.zeros((tokens, rows), np.float32), np.zeros((tokens, len(some)), "f4")
        matrix = _core.Matrix(gates, hidden, quant)
        matrix.matmul(x, product_, 2)
        matrix.matmul(x, part, 2, some)
        assert (part == product_[:, some]).all()
        out, counts = np.zeros_like(x), np.zeros((tokens, 3), np.int32)
        ffn = _core.Neurons(gates, weights[1], hidden, [quant] * 3, "drelu")
        ffn.forward(x, x, out, counts, "exact", 2)
        assert counts[:, 2].all()
        results.add((product_.tobytes(), out.tobytes()))
    _core.set_isa(before)
    assert len(results) == 1


def test_a_trial_is_made_once(trials: list[int], tmp_path: Path) -> None:
    file = tmp_path / "new" / "fetching.json"
    assert fetching.choose(2, WORTHWHILE, file) == FOUND
    kept = fetching.choose(2, WORTHWHILE, file)
    assert (str(kept), kept.source) == (str(FOUND), "kept")
    fetching.choose(1, WORTHWHILE, file)
    assert trials == [2, 1]
    assert len(json.loads(file.read_text())) == 2


def test_small_models_are_not_kept_waiting(trials: list[int], tmp_path: Path) -> None:
    assert fetching.choose(2, WORTHWHILE - 1, tmp_path / "none") is DEFAULT
    assert not trials
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "[1]", "3", '{"KEY": 3}', '{"KEY": "up:1:0,aside:1:0"}', '{"KEY": "aside:1:0"}']
)
def test_a_broken_file_counts_for_nothing(trials: list[int], tmp_path: Path, content: str) -> None:
    file = tmp_path / "fetching.json"
    fetching.choose(2, WORTHWHILE, file)
    (key,) = json.loads(file.read_text())
    file.write_text(content.replace("KEY", key))
    assert fetching.choose(2, WORTHWHILE, file) == FOUND
    assert fetching.choose(2, WORTHWHILE, file).source == "kept"
    assert trials == [2, 2]


def test_without_a_place_for_the_file_it_goes_on(trials: list[int], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert fetching.choose(2, WORTHWHILE, tmp_path / "file" / "fetching.json") == FOUND
    assert trials == [2]


def test_the_variable_overrides(
    trials: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetching.VARIABLE, "none:1:0,aside:2:512")
    found = fetching.choose(2, WORTHWHILE, tmp_path / "none")
    assert found == Fetching(Way("none", 1, 0), Way("aside", 2, 512), fetching.VARIABLE)
    assert not trials


@pytest.mark.parametrize(
    "text", ["fast", "up:1:0,aside:1:0", "none:3:0,none:1:0", "none:1:-1,none:1:0"]
)
@pytest.mark.usefixtures("trials")
def test_a_variable_that_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(fetching.VARIABLE, text)
    with pytest.raises(TurboSparseError, match=f"{fetching.VARIABLE}={text} is not understood"):
        fetching.choose(2, 0, tmp_path / "none")


def test_the_fastest_is_taken_if_it_gains() -> None:
    ways = [Way("stream", 1, 0), Way("aside", 1, 0), Way("none", 1, 0)]
    used: list[Way] = []

    for speeds, best in (
        ({"stream": 1.0, "aside": 2.0, "none": 0.5}, "aside"),
        ({"stream": 1.0, "aside": 1.03, "none": 0.5}, "stream"),
    ):
        found = fetching._fastest(ways, used.append, lambda speeds=speeds: speeds[used[-1].order])
        assert found.order == best


def test_a_real_trial_finds_ways_that_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "ROWS", 64)
    found = fetching.measure(2)
    assert found.together in fetching._TOGETHER
    assert Fetching.parse(str(found), "measured") == found
