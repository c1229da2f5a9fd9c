"""Compare a benchmark with the same benchmark at another commit, each with the core of its commit.

Used by ``ops.py --base REV``. The other commit stands in a temporary worktree; the two take turns.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


def compare(script: str, revision: str, arguments: list[str], pairs: int) -> str:
    """Run `script` of this folder here and at `revision`, `pairs` times each; the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    ours, base = [], []
    with built(revision) as (tree, environment):
        theirs = tree / "benchmarks" / script
        if not theirs.is_file():
            sys.exit(f"{revision} has no benchmarks/{script}")
        for _ in range(pairs):
            base.append(measure(theirs, arguments, environment, revision))
            ours.append(measure(ROOT / "benchmarks" / script, arguments, dict(os.environ), "ours"))
    return report(ours, base, revision)


@contextmanager
def built(revision: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a worktree of `revision` and the environment in which Python imports its package."""
    if run("git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").returncode:
        sys.exit(f"--base {revision}: no such commit here")
    with tempfile.TemporaryDirectory(prefix="turbosparse-base-") as folder:
        tree, package = Path(folder) / "tree", Path(folder) / "package"
        try:
            check(run("git", "worktree", "add", "--detach", tree, revision), "git worktree")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            built = run(*pip, "--no-build-isolation", "--target", package, tree)
            check(built, f"building {revision}")
            # the finder of the editable install stands before every path, unless an empty module
            # of its name is found first
            for finder in Path(sysconfig.get_path("purelib")).glob("_editable_*turbosparse.py"):
                (package / finder.name).touch()
            environment = os.environ | {"PYTHONPATH": str(package)}
            code = "import turbosparse; print(turbosparse.__file__)"
            found = run(sys.executable, "-c", code, env=environment).stdout
            assert found.startswith(str(package)), f"the base is not what runs, but {found}"
            yield tree, environment
        finally:
            run("git", "worktree", "remove", "--force", tree)


def measure(script: Path, arguments: list[str], environment: dict[str, str], who: str) -> Result:
    done = run(sys.executable, script, *arguments, env=environment)
    check(done, f"{script.name} of {who}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def check(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if ": error:" in line]
        sys.exit(f"{what} failed: {(errors or lines[-1:])[0].strip()}")


def report(ours: list[Result], base: list[Result], revision: str) -> str:
    """A line for each measured key: medians of the runs, and how many times faster ours are."""
    lines = [f"µs/layer, medians of {len(ours)} runs; ratio above 1: faster than {revision}"]
    keys = [key for key, value in ours[0].items() if isinstance(value, dict)]
    for key in keys:
        mine = [result[key]["us_per_layer"] for result in ours]
        if key not in base[0]:
            lines.append(f"  {key:14} {statistics.median(mine):9.1f}, not measured by {revision}")
            continue
        other = [result[key]["us_per_layer"] for result in base]
        ratios = [b / m for m, b in zip(mine, other, strict=True)]
        lines.append(
            f"  {key:14} {statistics.median(mine):9.1f} ours {statistics.median(other):9.1f} base "
            f"{statistics.median(ratios):6.3f} [{min(ratios):.3f}..{max(ratios):.3f}]"
        )
    return "\n".join(lines)
