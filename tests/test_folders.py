"""Folders are written whole or not at all, whatever ends the process; progress reaches logs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import named_disk_errors, new_file, new_folder, read_config
from turbosparse.base.progress import track

WRITES = """
import os, sys, time
from pathlib import Path
from turbosparse.base.folders import new_folder
with new_folder(Path(sys.argv[1])) as work:
    (work / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def writing(out: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `out`."""
    command = [sys.executable, "-c", WRITES, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    killed, living, other = (writing(tmp_path / name) for name in ("out", "out", "other"))
    for process in (killed, other):
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / ".out.notes.txt").write_text("someone else's")
    assert len(list(tmp_path.glob(".out.*"))) == 3
    with new_folder(tmp_path / "out") as work:
        (work / "whole").write_text("whole")
        left = {path.name.split(".")[2] for path in tmp_path.glob(".out.*")}
        assert left == {str(living.pid), str(os.getpid()), "notes"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert list(tmp_path.glob(".other.*")), "of another folder"
    living.kill()
    living.communicate()
    for process in (killed, other):
        process.communicate()


def test_a_folder_and_a_file_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def fsync(descriptor: int) -> None:
        said.append(Path(f"/proc/self/fd/{descriptor}").resolve().name.split(".")[-1])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda a, b: (said.append("NAMED"), rename(a, b))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (said.append("NAMED"), replace(a, b))[1])
    with new_folder(tmp_path / "out") as work:
        (work / "weights").write_text("w")
    assert said[0] == "weights"
    assert said[2:] == ["NAMED", tmp_path.name]
    said.clear()
    with new_file(tmp_path / "file") as file:
        file.write_text("f")
    assert said == [str(os.getpid()), "NAMED", tmp_path.name]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("unexpected pos 7 vs 5"), False),
    ],
)
def test_a_full_disk_is_told_by_the_systems_number(
    tmp_path: Path, error: Exception, full: bool
) -> None:
    expected = TurboSparseError if full else type(error)
    with pytest.raises(expected) as raised, named_disk_errors(tmp_path / "x"):
        raise error
    assert ("disk full while writing" in str(raised.value)) == full


def test_a_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        TurboSparseError, match=r"model\.gguf is a file; give the folder of a model"
    ):
        read_config(tmp_path / "model.gguf")


def test_progress_reaches_a_log_file_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("turbosparse.base.progress.time.monotonic", lambda: now)
    for _ in track(range(8), "measuring", total=8):
        now += 12
    said = capsys.readouterr().err.splitlines()
    assert said == [f"turbosparse: measuring: {done} of 8" for done in (3, 6)]
