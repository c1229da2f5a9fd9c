"""Serve packed models to many clients at once, by the OpenAI API.

turbosparse serve mistral-q4
"""

from __future__ import annotations

import os

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath
from turbosparse.base.machine import size_in_bytes
from turbosparse.base.progress import note
from turbosparse.benchmark.expected import expected_of
from turbosparse.engine.engine import Backend, Mode


def serve(
    packed: list[AnyPath],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    origin: list[str] | None = None,
    parallel: int = 16,
    queue: int = 64,
    timeout: float = 600.0,
    grace: float = 10.0,
    memory: str | None = None,
    kv_bytes: int | None = None,
    mode: Mode = "auto",
    backend: Backend = "auto",
    gpu_memory: str | None = None,
    threads: int | None = None,
    draft: str = "auto",
) -> None:
    """Answer requests until stopped by Ctrl-C or SIGTERM.

    Parameters
    ----------
    packed
        Packed folders; a request names one by the folder's name, and means the first if it names
        none. They are opened when first asked for.
    host
        Address to listen at. The default is reached from this machine only.
    port
        Port to listen at; 0 takes a free one.
    api_key
        Key that clients must send; by default that of the environment variable
        TURBOSPARSE_API_KEY, which other users of the machine do not see.
    origin
        A web page's origin, like https://example.org, that may call the server; may be repeated.
    parallel
        Texts decoded together.
    queue
        Texts that may wait besides; more are refused with status 429.
    timeout
        Seconds within which a request must end.
    grace
        Seconds that requests have to end when the server is stopped.
    memory
        What the weights of open models may take together, like 8GiB; the least recently used is
        closed first. A model that is larger runs from disk, within as much. By default all stay
        open.
    kv_bytes
        Bytes for keys and values of each model; by default half of what is available.
    mode
        exact skips neurons that are exactly zero and loses nothing; predicted also those that the
        folder's predictor does not pick, and may lose some; dense reads all.
    backend
        cpu is the C++ core; gpu an NVIDIA card; torch the slow reference.
    gpu_memory
        What each model may take of the card, like 8GiB, with --backend gpu; neurons that do not fit
        stay on the processor.
    threads
        Threads of the C++ core; by default all processors of this process.
    draft
        Who guesses tokens ahead for a text that is served alone: "auto", a packed folder of a
        smaller model, or "off"; see `turbosparse generate --help`.
    """
    if parallel < 1 or queue < 0 or not timeout > 0 or not grace >= 0:
        raise TurboSparseError(
            f"--parallel {parallel}, --queue {queue}, --timeout {timeout:g} and --grace {grace:g} "
            "must be at least 1, 0, above 0 and 0"
        )
    try:
        from turbosparse.serving import app, guard, models, process, scheduler
    except ImportError as error:
        raise TurboSparseError(
            f"the server needs {error.name}: pip install 'turbosparse[serve]'"
        ) from error
    key = api_key or os.environ.get("TURBOSPARSE_API_KEY") or None
    offered = models.Models(
        packed,
        size_in_bytes(memory, "--memory") if memory else None,
        draft=draft,
        mode=mode,
        backend=backend,
        gpu_memory=gpu_memory,
        threads=threads,
        kv_bytes=kv_bytes,
    )
    with offered.using(None) as first:
        note(first.engine.describe())
        if expected := expected_of(first.engine):
            note(f"one text alone: {expected:.2g} tokens/s expected")
    local = host in guard.LOOPBACK
    if not local and not key:
        note(
            f"WARNING: there is no --api-key, and {host} can be reached from elsewhere: "
            "anyone may use this server"
        )
    works = scheduler.Scheduler(parallel=parallel, queue=queue)
    routes = app.create_app(
        app.Server(offered, works, timeout),
        key=key,
        hosts=guard.LOOPBACK if local and not key else (),
        origins=origin or (),
    )
    process.run(routes, works, host=host, port=port, grace=grace)
