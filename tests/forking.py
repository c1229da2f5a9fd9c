"""Forks the processes of training runs, so that they do not import the libraries one by one.

A program for tests/processes.py: for each line of JSON on its standard input, {script, ranks, log},
it starts a process for each of `ranks`, the variables that torchrun would set, and answers with the
exit status of the first that failed, or 0.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from importlib.util import find_spec

IMPORTED = (
    "datasets",
    "torch.distributed.fsdp",
    "transformers",
    "turbosparse.hf.modeling_drelu",
    "turbosparse.hf.modeling_drelu_moe",
    "turbosparse.train",
    "turbosparse.training.trainer",
)
# where its folder is in the path
DEEPSPEED = ("deepspeed", "functorch.compile")


def become(rank: dict[str, str], script: str, log: str) -> None:
    """Run the script as this rank, in a process of its own."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(rank)
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(script: str, ranks: list[dict[str, str]], log: str) -> int:
    """As torchrun does, the first that fails ends the others."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    running = set()
    for rank in ranks:
        process = os.fork()
        if not process:
            become(meeting | rank, script, log)
        running.add(process)
    first = 0
    while running:
        process, status = os.wait()
        running.remove(process)
        if (code := os.waitstatus_to_exitcode(status)) and not first:
            first = code
            for other in running:
                os.kill(other, signal.SIGKILL)
    return first


def main() -> None:
    for name in DEEPSPEED * bool(find_spec("deepspeed")) + IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(run(**json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
