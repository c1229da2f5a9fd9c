"""The command line: quick help, one line for a mistake, JSON for programs, text as it comes."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbosparse import __version__, cli

Make = Callable[..., Path]
Run = Callable[..., SimpleNamespace]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "pydantic", "tokenizers", "datasets")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*words): call the entry point in this process; returns code, out and err."""

    def call(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["turbosparse", *map(str, words)])
        monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own handlers
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def model(packed_mistral: Path) -> Path:
    return packed_mistral


# --- help and lean imports ------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running `code`."""
    code += "\nimport sys\nprint('\\n', *{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import turbosparse, turbosparse.base.folders",
        "import turbosparse.cli",
        "import sys\nfrom turbosparse import cli\nsys.argv = ['turbosparse', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert stop.code == 0",
    ],
    ids=["package", "command line", "help"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_by(code)
    assert "turbosparse" in loaded
    assert not loaded.intersection(HEAVY)


def test_help_lists_every_verb(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    for verb, (_, summary) in cli.VERBS.items():
        assert verb in shown.out
        assert " ".join(summary.split()[:3]) in shown.out
    assert "--json" in shown.out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_its_parameters(run: Run, verb: str) -> None:
    shown = run(verb, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"Usage: turbosparse {verb}")
    assert "--show" not in shown.out
    module, function = cli.VERBS[verb][0].split(":")
    for parameter in inspect.signature(
        getattr(importlib.import_module(module), function)
    ).parameters:
        if parameter == "show":  # for programs: the command line shows pieces itself
            continue
        flag = f"--{parameter.replace('_', '-')}"
        assert re.search(rf"{flag}\b(?!-)", shown.out), f"{flag} is not explained"


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == __version__


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "unknown verb": (["pakc", "a", "b"], "pakc"),
    "unknown flag": (["inspect", "a", "--colour", "red"], "--colour"),
    "missing argument": (["pack", "a"], "out"),
    "bad choice": (["pack", "a", "b", "--quant", "q5"], "q5"),
    "bad number": (["generate", "a", "--prompt", "b", "--max-tokens", "many"], "many"),
    "no such folder": (["inspect", "./none"], "no such folder: none"),
    "bad mode": (["generate", "a", "--prompt", "b", "--mode", "guess"], "guess"),
    "bad input": (["pack", "a", "b", "--predictor-input", "oracle"], "oracle"),
    "no such model": (["convert", "./none", "b"], "no such folder: ./none; give a model folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "--json"])
def test_a_mistake_is_one_line_and_code_2(run: Run, mistake: str, flags: list[str]) -> None:
    words, message = MISTAKES[mistake]
    failed = run(*words, *flags)
    assert (failed.code, failed.out) == (2, "")
    assert failed.err.startswith("turbosparse: ")
    assert failed.err.count("\n") == 1
    assert message in failed.err


def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    entry = Path(sys.executable).with_name("turbosparse")
    done = subprocess.run([entry, "validate", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    message = f"{tmp_path} has no config.json; give the folder of a model"
    assert done.stderr == f"turbosparse: {message}\n"


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("turbosparse.inspect.Packed", interrupt)
    stopped = run("inspect", "model")
    assert (stopped.code, stopped.err) == (130, "turbosparse: interrupted\n")


# --- results --------------------------------------------------------------------------------------


def test_each_stage_hands_its_folder_to_the_next(run: Run, dense: Make, tmp_path: Path) -> None:
    for words in (
        ["convert", dense("llama"), tmp_path / "sparse", "--activation", "drelu"],
        ["pack", tmp_path / "sparse", tmp_path / "packed", "--quant", "q4"],
        ["validate", tmp_path / "packed"],
        ["inspect", tmp_path / "packed"],
    ):
        done = run(*words)
        asked = words[0] in ("validate", "inspect")  # what was asked for, not what was done
        assert done.code == 0, done.err
        assert (done.err if asked else done.out) == ""
        folder = str(words[-1] if len(words) == 2 else words[2])
        assert folder in (done.out if asked else done.err).replace("\n", "")


@pytest.mark.parametrize("verb", ["inspect", "validate", "generate"])
def test_json_is_the_last_line_of_standard_output(run: Run, model: Path, verb: str) -> None:
    prompt = ["--prompt", "Boats", "--max-tokens", "3"] if verb == "generate" else []
    done = run(verb, model, *prompt, "--json")
    assert done.code == 0
    assert done.err == ""
    result = json.loads(done.out.splitlines()[-1])
    expected = {
        "inspect": lambda: result["quant"] == "q8" and result["parts"]["attention"] > 0,
        "validate": lambda: result["folder"] == str(model) and result["files"] == 1,
        "generate": lambda: result["tokens"] == 3 and done.out.count("\n") == 1,
    }
    assert expected[verb]()


def test_generate_keeps_text_and_figures_apart(run: Run, model: Path) -> None:
    done = run("generate", model, "--prompt", "Boats", "--max-tokens", "4", "--threads", "1")
    assert done.code == 0
    assert "tokens/s" not in done.out
    assert done.err.count("\n") == 1
    assert "[packed-mistral: drelu q8, backend cpu (" in done.err
    assert "), mode exact, 1 thread, key-value cache at most " in done.err
    assert "stopped by length" in done.err


def test_a_prompt_may_begin_with_a_hyphen(run: Run, model: Path) -> None:
    assert run("generate", model, "--prompt", "--no", "--max-tokens", "1").code == 0


# the engine waits after its first steps until the test has looked
_HELD = """
import itertools, sys, time
from pathlib import Path
from turbosparse import cli
from turbosparse.engine.engine import Engine
step, calls, go = Engine.step, itertools.count(), Path(sys.argv.pop())
def held(*arguments):
    while next(calls) >= 12 and not go.exists():
        time.sleep(0.01)
    return step(*arguments)
Engine.step = held
cli.main()
"""


def test_generate_streams_and_reads_standard_input(model: Path, tmp_path: Path) -> None:
    """In a real process: the text is there before the figures, and a pipe may close early."""
    go = tmp_path / "go"
    words = ["generate", model, "--prompt", "-", "--max-tokens", "100", "--threads", "1", go]
    with subprocess.Popen(
        [sys.executable, "-c", _HELD, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(b"The small boats")
        process.stdin.close()
        assert process.stdout.read(1)
        assert process.poll() is None, "the first text must come before the last token"
        process.stdout.close()
        go.touch()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_from_outside_unwinds_like_any_error(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """So that what is half-written goes; but nohup's wish is followed."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr("signal.getsignal", lambda _: signal.SIG_DFL)
    monkeypatch.setattr("signal.signal", lambda which, what: handlers.update({which: what}))
    monkeypatch.setattr("sys.argv", ["turbosparse", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    with pytest.raises(SystemExit) as stop:
        handlers.pop(number)(number, None)
    assert stop.value.code == 128 + number
    monkeypatch.setattr("signal.getsignal", lambda _: signal.SIG_IGN)
    with pytest.raises(SystemExit):
        cli.main()
    assert number not in handlers
