"""What this process may use: processors, accelerators, and the other processes of its run."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Literal

from turbosparse.base.errors import TurboSparseError


def threads_to_use(asked: int | None) -> int:
    """The number of threads, checked against the processors that this process may use.

    The default is also no more than what a container's quota of processor time is worth.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if asked is None:
        return min(cores, _processor_quota() or cores)
    if not 1 <= asked <= cores:
        raise TurboSparseError(f"--threads {asked}: this process may use 1 to {cores}")
    return asked


def _processor_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The processors that the control group's quota pays for, rounded up; None without one."""
    v1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    for files in (("cpu.max",), v1):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
            quota_us, period_us = int(quota), int(period)
        except (OSError, ValueError):  # another version, or "max": no quota
            continue
        if quota_us > 0 and period_us > 0:  # version 1 says -1 for none
            return -(-quota_us // period_us)
    return None


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as far as the system tells."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def cache_folder() -> Path:
    """Where this program keeps what it would find out again: the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turbosparse"


Device = Literal["auto", "cpu", "cuda"]


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def device_to_use(asked: Device) -> Literal["cpu", "cuda"]:
    """What a --device stands for: auto takes a GPU if there is one.

    Raises:
        TurboSparseError: there is none, and it was asked for.
    """
    if asked == "auto":
        return "cuda" if has_accelerator() else "cpu"
    if asked == "cuda" and not has_accelerator():
        raise TurboSparseError(
            "--device cuda: torch finds no GPU; see whether nvidia-smi lists one and torch is "
            "built for CUDA, or leave --device out"
        )
    return asked


def world_size() -> int:
    """The processes of this run, by torchrun's word."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_bf16(precision: str) -> bool:
    import torch

    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    machine = torch.cpu.get_capabilities()
    return bool(machine.get("amx_bf16") or machine.get("avx512_bf16"))


def memory_available(root: Path = Path("/")) -> int:
    """Bytes that this process could still use: of the machine, and of its control group."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    groups = root / "sys/fs/cgroup"
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((groups / limit).read_text()) - int((groups / usage).read_text())
        except (OSError, ValueError):  # another version, or "max": no limit
            continue
        free = min(free, max(0, left))
    return free


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size_in_bytes(text: str | int, flag: str) -> int:
    """A number of bytes, or one with a unit: 8GiB, 500 MB, 2g.

    Raises:
        TurboSparseError: it is none; the message names the flag.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", str(text).lower(), re.ASCII)
    if not found or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise TurboSparseError(f"{flag} {text} is no size; give one like 8GiB, 500MB or 8000000000")
    return size


def size_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def memory_in_use() -> int:
    """Bytes of this process that stand in memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
