"""The borders of the C++ core: what it refuses, whose memory it reads, its instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbosparse import _core
from turbosparse.hf.activations import WITHOUT_ZEROS

F32 = np.float32


def zeros(*shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def matrix(rows: int = 7, cols: int = 32) -> _core.Matrix:
    return _core.Matrix(zeros(rows, cols + 16), cols, "q8")


def neurons(activation: str = "drelu", predictor: Any = None) -> _core.Neurons:
    rows = zeros(7, 32), zeros(7, 64)
    return _core.Neurons(*rows, 32, ["q4"] * 3, activation, predictor)


def call(what: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function of the core, and arguments that it takes."""
    x, out, counts = zeros(3, 32, dtype=F32), zeros(3, 7, dtype=F32), zeros(3, 3, dtype=np.int32)
    arguments: dict[str, dict[str, Any]] = {
        "Matrix": {"data": zeros(7, 32), "cols": 32, "quant": "q4"},
        "matmul": {"x": x, "out": out, "threads": 1},
        "row": {"index": 6, "out": zeros(32, dtype=F32)},
        "Neurons": {"gates": zeros(7, 32), "pairs": zeros(7, 64), "hidden": 32}
        | {"quants": ["q4"] * 3, "activation": "drelu"},
        "forward": {"x": x, "residual": x, "out": zeros(3, 32, dtype=F32), "counts": counts}
        | {"mode": "exact", "threads": 1},
        "Signs": {"bits": zeros(7, 128), "hidden": 32, "threshold": 0.0},
    }
    of = {"matmul": matrix(), "row": matrix(), "forward": neurons()}.get(what, _core)
    return getattr(of, what), arguments[what]


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("Matrix", {"data": zeros(7, 128)}, r"\(7, 128\), expected \(7, 32\)"),
        ("Matrix", {"data": zeros(7, 18)}, r"\(7, 18\), expected \(7, 32\)"),
        ("Matrix", {"cols": 33}, "33, expected a multiple of 32"),
        ("Matrix", {"cols": 33, "quant": "q8"}, "33, expected a multiple of 32"),
        ("Matrix", {"cols": 0, "quant": "f16"}, "0, expected at least 1"),
        ("Matrix", {"cols": -32}, "-32, expected at least 1"),
        ("Matrix", {"quant": "q5"}, "'q5', expected one of f16, q8, q4, q4_0"),
        ("Matrix", {"data": zeros(7, 32, dtype=np.int8)}, "incompatible"),
        ("Matrix", {"data": zeros(7, 64)[:, ::2]}, "incompatible"),
        ("Matrix", {"data": zeros(32)}, "incompatible"),
        ("matmul", {"x": zeros(3, 31, dtype=F32)}, r"x has shape \(3, 31\), expected"),
        ("matmul", {"x": zeros(3, 32, dtype=np.float64)}, "incompatible"),
        ("matmul", {"x": zeros(3, 64, dtype=F32)[:, ::2]}, "incompatible"),
        ("matmul", {"x": zeros(32, dtype=F32)}, "incompatible"),
        ("matmul", {"out": zeros(7, 3, dtype=F32)}, r"expected \(3, 7\)"),
        ("matmul", {"out": zeros(3, 7, dtype=np.float64)}, "incompatible"),
        ("matmul", {"out": zeros(7, 3, dtype=F32).T}, "incompatible"),
        ("matmul", {"out": read_only(zeros(3, 7, dtype=F32))}, "incompatible"),
        ("matmul", {"threads": 0}, "threads is 0, expected 1 to"),
        ("matmul", {"threads": -1}, "threads is -1, expected 1 to"),
        ("row", {"index": 7}, "index is 7, expected 0 to 6"),
        ("row", {"index": -1}, "index is -1, expected 0 to 6"),
        ("row", {"out": zeros(31, dtype=F32)}, "31 values, expected 32"),
        ("row", {"out": zeros(32, dtype=np.float64)}, "incompatible"),
        ("row", {"out": zeros(64, dtype=F32)[::2]}, "incompatible"),
        ("Neurons", {"gates": zeros(7, 64)}, r"gates .*expected \(7, 32\)"),
        ("Neurons", {"pairs": zeros(7, 32)}, r"pairs .*expected \(7, 64\)"),
        ("Neurons", {"pairs": zeros(6, 64)}, r"pairs .*expected \(7, 64\)"),
        ("Neurons", {"hidden": 48, "quants": ["q8"] * 3}, "hidden is 48"),
        ("Neurons", {"quants": ["q4", "Q4", "q4"]}, "quant is 'Q4'"),
        ("Neurons", {"quants": ["q4"]}, "quants must be those of gate, up and down"),
        ("Neurons", {"activation": "relu2"}, "quants must be those of up and down"),
        ("Neurons", {"quants": [], "activation": "relu2"}, "quants must be those of up and down"),
        (
            "Neurons",
            {"activation": "relu2", "quants": ["q4"] * 2},
            r"pairs .*\(7, 64\), expected \(7, 32\)",
        ),
        ("Neurons", {"activation": "gelu"}, "activation is 'gelu'"),
        ("Neurons", {"threshold": -0.5}, "threshold is -0.5"),
        ("Neurons", {"threshold": float("nan")}, "threshold is nan"),
        ("Neurons", {"gates": zeros(7, 32, dtype=F32)}, "incompatible"),
        ("Neurons", {"predictor": "sign"}, "incompatible"),
        ("forward", {"x": zeros(3, 64, dtype=F32)}, r"x has shape \(3, 64\), expected"),
        ("forward", {"x": zeros(3, 32, dtype=np.float16)}, "incompatible"),
        ("forward", {"residual": zeros(2, 32, dtype=F32)}, r"residual has shape \(2, 32\)"),
        ("forward", {"out": zeros(2, 32, dtype=F32)}, r"expected \(3, 32\)"),
        ("forward", {"out": zeros(3, 64, dtype=F32)[:, :32]}, "incompatible"),
        ("forward", {"counts": zeros(3, 2, dtype=np.int32)}, r"expected \(3, 3\)"),
        ("forward", {"counts": zeros(3, 3, dtype=np.int64)}, "incompatible"),
        ("forward", {"counts": zeros(3, 3, dtype=np.int32).T}, "incompatible"),
        ("forward", {"elsewhere": zeros(1)}, "elsewhere and uses belong together"),
        (
            "forward",
            {"elsewhere": zeros(2), "uses": zeros(2, dtype=np.int32)},
            r"elsewhere has shape \(2\), expected \(1\)",
        ),
        ("forward", {"elsewhere": zeros(1), "uses": zeros(1)}, "incompatible"),
        ("forward", {"threads": 0}, "threads is 0"),
        ("forward", {"mode": "sparse"}, "'sparse', expected one of dense, exact, predicted"),
        ("forward", {"mode": "predicted"}, "predicted mode needs a predictor"),
        ("Signs", {"bits": zeros(7, 100)}, r"bits has shape \(7, 100\), expected \(7, 64\)"),
        ("Signs", {"bits": zeros(7, 0)}, r"bits has shape \(7, 0\), expected \(7, 64\)"),
        ("Signs", {"hidden": 0}, "hidden is 0, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(what: str, change: dict[str, Any], message: str) -> None:
    function, arguments = call(what)
    function(**arguments)
    with pytest.raises(TypeError if message == "incompatible" else ValueError, match=message):
        function(**arguments | change)


@pytest.mark.parametrize("activation", WITHOUT_ZEROS)
@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_what_has_no_zeros_has_only_dense_mode(activation: str, mode: str) -> None:
    _, arguments = call("forward")
    message = f"'{activation}', which has no exact zeros to skip: use dense mode"
    with pytest.raises(ValueError, match=message):
        neurons(activation).forward(**arguments | {"mode": mode})


def test_a_predictor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="fc1 has 32 rows, expected the 64 columns of fc2"):
        _core.LowRank(matrix(32), matrix(7, 64), 0.0, False)
    with pytest.raises(ValueError, match="of 6 neurons and hidden 32, expected 7 and 32"):
        neurons(predictor=_core.LowRank(matrix(32), matrix(6), 0.0, False))
    with pytest.raises(ValueError, match="of 7 neurons and hidden 64, expected 7 and 32"):
        neurons(predictor=_core.Signs(zeros(7, 128), 64, 0.0))


def test_no_rows_and_no_tokens() -> None:
    matrix(0).matmul(np.ones((3, 32), F32), zeros(3, 0, dtype=F32), 1)
    matrix(7).matmul(np.ones((0, 32), F32), zeros(0, 7, dtype=F32), 1)


# -- whose memory --------------------------------------------------------------------------------


def test_work_is_counted_where_it_is_done() -> None:
    rows, cols = 4096, 64  # some shares of 64 KiB
    large, x = matrix(rows, cols), np.ones((1, cols), np.float32)

    def multiply(threads: int) -> tuple[int, int, int]:
        out = np.empty((1, rows), np.float32)
        return _core.count_work(lambda: large.matmul(x, out, threads))

    assert multiply(1) == (0, cols + rows * cols, 0)  # the input is prepared, and met by all rows
    assert multiply(2) == (1, cols, rows * cols / 2)


def low_rank(rows: np.ndarray[Any, Any]) -> _core.LowRank:
    """Both matrices are these rows."""
    return _core.LowRank(*[_core.Matrix(rows, 32, "q8")] * 2, 0.0, False)


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((7, 48), lambda rows: _core.Matrix(rows, 32, "q8")),
        ((7, 32), lambda rows: _core.Neurons(rows, zeros(7, 64), 32, ["q4"] * 3, "drelu")),
        ((7, 64), lambda rows: _core.Neurons(zeros(7, 32), rows, 32, ["q4"] * 3, "drelu")),
        ((32, 48), low_rank),
        ((7, 128), lambda rows: neurons(predictor=_core.Signs(rows, 32, 0.0))),
    ],
    ids=["Matrix", "gates", "pairs", "LowRank", "Signs of Neurons"],
)
def test_an_array_lives_as_long_as_what_reads_it(
    shape: tuple[int, int], make: Callable[..., Any]
) -> None:
    data = zeros(*shape)
    alive = weakref.ref(data)
    reader = make(data)
    del data
    assert alive() is not None
    del reader
    assert alive() is None


def test_a_read_only_memmap_will_do(tmp_path: Path) -> None:
    halves = np.arange(32, dtype=np.float16)
    np.tile(halves, (7, 1)).tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.uint8, mode="r").reshape(7, 64)
    stored = _core.Matrix(mapped, 32, "f16")
    del mapped
    out = zeros(32, dtype=F32)
    stored.row(6, out)
    np.testing.assert_array_equal(out, halves)


# -- the instruction sets ------------------------------------------------------------------------


def test_the_reference_is_everywhere() -> None:
    assert _core.available_isas()[-1] == "ref"


def test_an_unknown_instruction_set_is_named() -> None:
    before = _core.isa()
    with pytest.raises(ValueError, match=r"TURBOSPARSE_ISA\) is 'mmx', this machine has .*ref"):
        _core.set_isa("mmx")
    assert _core.isa() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ref", "ref\n"),
        ("mmx", "ValueError: the instruction set (TURBOSPARSE_ISA) is 'mmx'"),
    ],
)
def test_the_environment_names_one(name: str, message: str) -> None:
    code = "from turbosparse import _core; print(_core.isa())"
    command, environment = [sys.executable, "-c", code], os.environ | {"TURBOSPARSE_ISA": name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert message in done.stdout + done.stderr
