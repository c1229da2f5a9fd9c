"""The comparison of a benchmark with another commit, on made-up results."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def base(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("base")


def test_ratios_are_of_the_pairs(base):
    ours = [{"threads": 1, "ref dense": {"us_per_layer": t}} for t in (10.0, 20.0, 10.0)]
    theirs = [{"threads": 1, "ref dense": {"us_per_layer": t}} for t in (20.0, 20.0, 5.0)]
    assert base.report(ours, theirs, "main").splitlines() == [
        "µs/layer, medians of 3 runs; ratio above 1: faster than main",
        "  ref dense           10.0 ours      20.0 base  1.000 [0.500..2.000]",
    ]


def test_what_the_base_does_not_measure_is_said(base):
    ours = [{"neon dense": {"us_per_layer": 3.0}}]
    assert "neon dense           3.0, not measured by main" in base.report(ours, [{}], "main")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(2)", "ops.py of main failed: exit code 2"),
        (
            "import argparse; argparse.ArgumentParser('ops.py').parse_args()",
            "ops.py of main failed: ops.py: error: unrecognized arguments: --tokens=2",
        ),
        ("print(1 / 0)", "ops.py of main failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_run_that_fails_is_one_line(base, tmp_path, script, message):
    (tmp_path / "ops.py").write_text(script)
    with pytest.raises(SystemExit) as stopped:
        base.measure(tmp_path / "ops.py", ["--tokens=2"], {}, "main")
    assert stopped.value.code == message


def test_an_unknown_commit_is_one_line():
    command = [sys.executable, BENCHMARKS / "ops.py", "--base", "no-such-commit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "--base no-such-commit: no such commit here\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_the_one_for_a_gpu_says_that_there_is_none():
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("bench-gpu needs an NVIDIA GPU, and torch finds none;")
