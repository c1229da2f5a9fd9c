"""NEON kernels and rows from disk on emulated ARM, by two programs beside this file."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
NATIVE = platform.machine() == "aarch64"
COMPILER = shutil.which("g++" if NATIVE else "aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

MISSING = [
    name
    for name, found in {
        "g++ for aarch64 (g++-aarch64-linux-gnu)": COMPILER,
        "qemu-aarch64 (qemu-user)": NATIVE or EMULATOR,
    }.items()
    if not found
]
REQUIRED = os.environ.get("TURBOSPARSE_REQUIRE_NEON") == "1"


pytestmark = pytest.mark.skipif(
    bool(MISSING) and not REQUIRED, reason=f"needs {' and '.join(MISSING)}"
)


def test_kernels(tmp_path):
    assert not MISSING
    flags = ["-std=c++17", "-O2", "-static", "-march=armv8.2-a+dotprod", f"-I{SOURCES}"]
    flags += ["-DTURBOSPARSE_ARM", "-DKERNELS=neon_kernels"]
    files = [TESTS / "kernels_check.cpp", *(SOURCES / f"kernels_{n}.cpp" for n in ("ref", "neon"))]
    subprocess.run([COMPILER, *flags, *files, "-o", tmp_path / "check"], check=True)
    emulator = [] if NATIVE else [EMULATOR, "-cpu", "max"]
    done = subprocess.run([*emulator, tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rows_from_disk(tmp_path):
    flags = ["-std=c++17", "-O1", "-static", "-pthread", f"-I{SOURCES}"]
    files = [TESTS / "store_check.cpp", SOURCES / "store.cpp"]
    subprocess.run([COMPILER, *flags, *files, "-o", tmp_path / "check"], check=True)
    emulator = [] if NATIVE else [EMULATOR]
    done = subprocess.run([*emulator, tmp_path / "check", tmp_path / "rows"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
