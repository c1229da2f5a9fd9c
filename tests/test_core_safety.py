"""What the C++ core does when it is used wrongly, from several threads, and across fork()."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from turbosparse import _core

HIDDEN, HEADS, KV_HEADS, HEAD, VOCABULARY, NEURONS, LAYERS = 32, 4, 2, 8, 64, 48, 2
PAGE = 64  # positions


def rows(count: int, cols: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random rows of an f16 matrix, padded to 64 bytes."""
    weights = np.random.default_rng(seed).standard_normal((count, cols)) / np.sqrt(cols)
    data = weights.astype(np.float16).view(np.uint8)
    return np.pad(data, ((0, 0), (0, -data.shape[1] % 64)))


def matrix(count: int, cols: int = HIDDEN, seed: int = 0) -> _core.Matrix:
    return _core.Matrix(rows(count, cols, seed), cols, "f16")


def neurons(hidden: int = HIDDEN, seed: int = 0) -> _core.Neurons:
    gates, pairs = rows(NEURONS, hidden, seed), rows(2 * NEURONS, hidden, seed + 1)
    return _core.Neurons(gates, pairs.reshape(NEURONS, -1), hidden, ["f16"] * 3, "drelu")


def ones(count: int = HIDDEN, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(count, dtype)


def layer(**change: Any) -> _core.Layer:
    shapes = (HEADS * HEAD, HIDDEN), (KV_HEADS * HEAD, HIDDEN)
    arguments = {
        "matrices": [matrix(*shape) for shape in (shapes[0], shapes[1], shapes[1], shapes[0])],
        "biases": [None] * 4,
        "attention_norm": ones(),
        "ffn_norm": ones(),
        "router": None,
        "ffns": [neurons()],
        "window": 0,
    }
    return _core.Layer(**(arguments | change))


def decoder(**change: Any) -> _core.Decoder:
    arguments = {
        "embedding": matrix(VOCABULARY),
        "head": matrix(VOCABULARY),
        "norm": ones(),
        "layers": [layer() for _ in range(LAYERS)],
        "frequencies": ones(HEAD // 2),
        "rope_scale": 1.0,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD,
        "experts_used": 1,
        "norm_eps": 1e-5,
    }
    return _core.Decoder(**(arguments | change))


def step(
    model: _core.Decoder,
    caches: list[Any],
    tokens: list[list[int]],
    layers: int = LAYERS,
    **rest: Any,
) -> np.ndarray[Any, Any]:
    total = sum(map(len, tokens))
    logits = np.full((len(tokens), VOCABULARY), np.nan, np.float32)
    counts = np.full((layers, total, 3), -1, np.int32)
    arrays = [np.array(new, np.int32) for new in tokens]
    model.step(caches, arrays, False, "exact", rest.pop("threads", 1), logits, counts, **rest)
    return logits


# -- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAYERS, LAYERS + 1])
def test_a_cache_of_another_model_is_refused(layers: int):
    """Also one of the same shape: it would give wrong text."""
    cache = decoder().new_cache(9)
    with pytest.raises(ValueError, match="sequence 0: its cache belongs to another model"):
        step(decoder(layers=[layer()] * layers), [cache], [[1]], layers)
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("wrong", [None, 1, "cache"])
def test_what_is_not_a_cache_is_refused(wrong: Any):
    model = decoder()
    cache = model.new_cache(9)
    with pytest.raises(ValueError, match=r"caches\[1\] is not a Cache"):
        step(model, [cache, wrong], [[1], [1]])
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1], [2]], "sequence 1: its cache is also that of an earlier one"),
        ([[VOCABULARY]], "sequence 0: token 64 is outside the vocabulary of 64"),
        ([[1, -1]], "sequence 0: token -1 is outside"),
        ([[]], "sequence 0: it has no new token"),
        ([[1] * 9], "sequence 0: 10 tokens do not fit the context of 9"),
    ],
)
def test_a_refused_step_changes_nothing(tokens: list[list[int]], message: str):
    model = decoder()
    cache = model.new_cache(9)
    step(model, [cache], [[5]])
    before = cache.nbytes
    with pytest.raises(ValueError, match=message):
        step(model, [cache] * len(tokens), tokens)
    assert (cache.length, cache.nbytes) == (1, before)


def test_threads_that_share_a_cache_keep_within_its_context():
    model, threads, each = decoder(), 4, 40
    cache = model.new_cache(100)
    refused: list[str] = []

    def read() -> None:
        for _ in range(each):
            try:
                step(model, [cache], [[1]])
            except ValueError as error:
                refused.append(str(error))

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cache.length == 100
    assert refused == ["sequence 0: 101 tokens do not fit the context of 100"] * (
        threads * each - 100
    )


def test_a_cache_is_copied_cut_and_freed():
    model = decoder()
    cache = model.new_cache(1000)
    shape = LAYERS, KV_HEADS, HEAD
    step(model, [cache], [[n % VOCABULARY for n in range(100)]])
    assert cache.nbytes == _core.cache_bytes(100, *shape) == 2 * _core.cache_bytes(1, *shape)

    other = cache.copy(cache.length)
    assert (other.length, other.context, other.nbytes) == (100, 1000, cache.nbytes)
    expected = step(model, [cache], [[7, 8]])
    np.testing.assert_array_equal(step(model, [other], [[7, 8]]), expected)
    part = cache.copy(PAGE)
    assert (part.length, part.nbytes) == (PAGE, _core.cache_bytes(PAGE, *shape))
    for cut in (cache, other):
        cut.truncate(100)
    step(model, [other], [[9]])
    np.testing.assert_array_equal(step(model, [cache], [[7, 8]]), expected)  # it stands alone

    cache.truncate(PAGE)
    assert (cache.length, cache.nbytes) == (PAGE, _core.cache_bytes(PAGE, *shape))
    for length in (-1, PAGE + 1):
        with pytest.raises(ValueError, match=f"length is {length}, expected 0 to the 64"):
            cache.truncate(length)
        with pytest.raises(ValueError, match=f"length is {length}, expected 0 to the 64"):
            cache.copy(length)
    cache.free()
    assert (cache.length, cache.nbytes) == (0, 0)
    fresh = step(model, [model.new_cache(9)], [[3]])
    np.testing.assert_array_equal(step(model, [cache], [[3]]), fresh)


def test_a_cache_outlives_its_decoder():
    model = decoder()
    cache = model.new_cache(9)
    step(model, [cache], [[1]])
    del model
    assert cache.copy(1).length == 1


def test_a_cancelled_step_leaves_the_cache_as_it_was():
    model, cancel = decoder(), _core.Cancel()
    cache = model.new_cache(1000)
    step(model, [cache], [[1, 2]], cancel=cancel)
    before = cache.nbytes
    cancel.set()
    assert cancel.is_set()
    with pytest.raises(_core.Cancelled, match="cancelled"):
        step(model, [cache], [[3] * 500], cancel=cancel)
    assert (cache.length, cache.nbytes) == (2, before)


def test_another_thread_cancels_a_step():
    layers = 2000
    model, cancel = decoder(layers=[layer()] * layers), _core.Cancel()
    timer = threading.Timer(0.05, cancel.set)
    cache = model.new_cache(1000)
    timer.start()
    with pytest.raises(_core.Cancelled):
        step(model, [cache], [[1] * 999], layers, cancel=cancel)
    assert cache.length == 0


# -- what is built by hand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"biases": [ones(dtype=np.float64), None, None, None]}, TypeError, "incompatible"),
        (lambda: {"biases": [ones(3), None, None, None]}, ValueError, "a bias: 3, expected 32"),
        (lambda: {"biases": [None] * 3}, ValueError, "biases of a layer: 3, expected 4"),
        (lambda: {"matrices": [matrix(32)] * 3}, ValueError, "matrices of a layer: 3, expected 4"),
        (lambda: {"matrices": [None] * 4}, ValueError, "a matrix is None"),
        (lambda: {"ffns": []}, ValueError, "feed-forwards without a router: 0, expected 1"),
        (lambda: {"ffns": [None]}, ValueError, "a feed-forward is None"),
        (
            lambda: {"ffns": [neurons()] * 2},
            ValueError,
            "feed-forwards without a router: 2, expected 1",
        ),
        (
            lambda: {"ffns": [neurons(64)]},
            ValueError,
            "hidden size of a feed-forward: 64, expected 32",
        ),
        (lambda: {"ffn_norm": ones(31)}, ValueError, "ffn_norm: 31, expected 32"),
        (lambda: {"attention_norm": ones(dtype=np.float16)}, TypeError, "incompatible"),
        (
            lambda: {"router": np.ones((1, 31), np.float32)},
            ValueError,
            r"router has shape \(1, 31\)",
        ),
        (lambda: {"router": np.ones((2, 32), np.float32)}, ValueError, r"expected \(1, 32\)"),
        (lambda: {"router": np.ones((1, 32))}, TypeError, "incompatible"),
        (lambda: {"window": -5}, ValueError, "window is -5"),
    ],
)
def test_layer_refuses(change: Callable[[], dict[str, Any]], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        layer(**change())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"head": matrix(VOCABULARY, 64)}, ValueError, "columns of head: 64, expected 32"),
        (lambda: {"head": matrix(VOCABULARY + 1)}, ValueError, "rows of head: 65, expected 64"),
        (lambda: {"norm": ones(16)}, ValueError, "norm: 16, expected 32"),
        (lambda: {"norm": ones(dtype=np.float64)}, TypeError, "incompatible"),
        (lambda: {"layers": [None]}, ValueError, "a layer is None"),
        (lambda: {"frequencies": ones(0)}, ValueError, "frequencies is empty"),
        (
            lambda: {"frequencies": ones(HEAD // 2 + 1)},
            ValueError,
            f"head_dim is {HEAD}, expected at least {HEAD + 2}, twice the frequencies",
        ),
        (lambda: {"head_dim": HEAD + 2}, ValueError, f"rows of q: 32, expected {4 * (HEAD + 2)}"),
        (lambda: {"norm_bias": ones(3)}, ValueError, "the values of norm: 3, expected 32"),
        (
            lambda: {"kv_heads": 3},
            ValueError,
            "heads is 4, expected a multiple of kv_heads, which is 3",
        ),
        (lambda: {"heads": 0}, ValueError, "heads is 0"),
        (lambda: {"experts_used": 2}, ValueError, "experts_used is 2, expected 1 to 1"),
        (lambda: {"norm_eps": -1.0}, ValueError, "norm_eps is -1"),
    ],
)
def test_decoder_refuses(
    change: Callable[[], dict[str, Any]], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        decoder(**change())


def test_a_model_keeps_what_it_was_made_of_and_not_the_lists():
    """The lists and the arrays may go or change afterwards."""
    experts = [neurons(seed=seed) for seed in range(3)]
    parts: dict[str, Any] = {
        "biases": [ones(HEADS * HEAD), None, None, None],
        "ffns": list(experts),
        "router": np.eye(3, HIDDEN, dtype=np.float32),
    }
    layers = [layer(**parts)]
    model = decoder(layers=layers, experts_used=2)
    expected = step(model, [model.new_cache(9)], [[1, 2]], 1)
    for kept in (*parts.values(), layers, experts):
        if isinstance(kept, list):
            kept.clear()
    filler = [np.full(HEADS * HEAD, np.nan, np.float32) for _ in range(100)]
    np.testing.assert_array_equal(step(model, [model.new_cache(9)], [[1, 2]], 1), expected)
    del filler


def test_nan_in_the_router_shows_in_the_logits():
    router = np.full((3, HIDDEN), np.nan, np.float32)
    model = decoder(layers=[layer(router=router, ffns=[neurons()] * 3)], experts_used=2)
    logits = step(model, [model.new_cache(9)], [[1]], 1)
    assert np.isnan(logits).all()


# -- threads and fork ----------------------------------------------------------------------------

MODEL = """
import os, sys, threading, time
import numpy as np
sys.path.insert(0, "tests")
from test_core_safety import LAYERS, decoder, step

model = decoder()
cache = model.new_cache(1 << 20)
prompt = [[n % 64 for n in range(200)]]

def child(threads):
    pid = os.fork()
    if pid:
        for _ in range(1000):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, 9)
        return "hangs"
    try:
        got = step(model, [model.new_cache(999)], prompt, threads=threads)
        names = len(os.listdir("/proc/self/task"))
        os._exit(0 if np.array_equal(got, expected) and names == threads else 1)
    finally:
        os._exit(2)
"""

BUSY = """
expected = step(model, [model.new_cache(999)], prompt, threads=2)
stop = False
def read():
    while not stop:
        step(model, [cache], prompt, threads=2)
        cache.free()
thread = threading.Thread(target=read)
thread.start()
print({child(2) for _ in range(20)})
stop = True
thread.join()
"""

ASLEEP = """
expected = step(model, [model.new_cache(999)], prompt, threads=2)
time.sleep(0.1)
more = step(model, [model.new_cache(999)], prompt, threads=5)
time.sleep(0.1)
print({child(2)})
expected = more
print({child(5)})
expected = step(model, [model.new_cache(999)], prompt, threads=7)
print({child(7)})
"""

FIRST = """
expected = step(model, [model.new_cache(999)], prompt, threads=2)
time.sleep(0.1)
pid = os.fork()
if not pid:
    got = step(model, [cache], prompt, threads=4)
    os._exit(len(os.listdir("/proc/self/task")))
print({os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("script", "expected"),
    [(BUSY, "{0}\n"), (ASLEEP, "{0}\n" * 3), (FIRST, "{4}\n")],
    ids=["while another thread is in a step", "with sleeping workers", "with more threads"],
)
def test_a_forked_child_computes_with_all_its_threads(script: str, expected: str):
    command = [sys.executable, "-c", MODEL + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr
