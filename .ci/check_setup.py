"""Look for what `make setup` needs and say what to install; written for any Python 3."""

import importlib.util
import os
import shutil
import sys
import sysconfig

PYTHON = (3, 11)
COMPILERS = ("c++", "g++", "clang++")
INSTALL = (
    "  Debian, Ubuntu  apt-get install g++ python3-dev python3-venv\n"
    "  Fedora          dnf install gcc-c++ python3-devel python3-pip\n"
    "  macOS           xcode-select --install; brew install python"
)


def missing():
    """What this machine lacks, a line each."""
    lacks = []
    if sys.version_info < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        lacks.append(
            f"Python {wanted} or newer: {sys.executable} is {sys.version.split()[0]}; with a newer "
            "one beside it: make setup PYTHON=/path/to/python3"
        )
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        lacks.append("Python's venv and ensurepip, which put pip into the environment")
    include = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(include, "Python.h")):
        lacks.append(f"Python's headers: no Python.h in {include}")
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in named or COMPILERS):
        lacks.append(
            f"the C++ compiler that CXX names: {named[0]}"
            if named
            else f"a C++ compiler: none of {', '.join(COMPILERS)} is in PATH"
        )
    return lacks


def main():
    lacks = missing()
    if not lacks:
        return 0
    lines = [f"  - {lack}" for lack in lacks]
    print("make setup lacks:", *lines, "Install it:", INSTALL, sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
