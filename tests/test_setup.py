"""What `make setup` says on a machine that cannot build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = ROOT / ".ci" / "check_setup.py"
PACKAGES = ("apt-get install g++", "dnf install gcc-c++", "xcode-select --install")


def test_without_a_compiler_setup_ends_before_it_makes_anything(tmp_path: Path) -> None:
    names = ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt", ".ci")
    for name in names:
        (tmp_path / name).symlink_to(ROOT / name)
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "MAKEFLAGS")}
    done = subprocess.run(
        [str(shutil.which("make")), "setup", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env=environment | {"PATH": str(empty)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "a C++ compiler: none of c++, g++, clang++ is in PATH" in done.stderr
    assert all(packages in done.stderr for packages in PACKAGES)
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(CHECK.parent)
    monkeypatch.delenv("CXX", raising=False)
    return __import__("check_setup").missing


def test_a_machine_that_can_build_lacks_nothing(missing) -> None:
    assert missing() == []


def test_every_lack_is_named(missing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    python, venv, headers, compiler = missing()
    assert python.startswith("Python 3.11 or newer")
    assert "venv and ensurepip" in venv
    assert headers.endswith(f"no Python.h in {tmp_path}")
    assert compiler == "the C++ compiler that CXX names: no-such-compiler"
