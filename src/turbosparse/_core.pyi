"""The C++ core. Arrays are taken as they are: another dtype or stride raises."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def read_all(words: NDArray[np.uint64], threads: int, cache: int) -> int: ...
def run_sections(count: int, threads: int) -> None: ...
def count_work(call: Callable[[], object]) -> tuple[int, int, int]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def set_fetching(together: tuple[str, int, int], scattered: tuple[str, int, int]) -> None: ...

class Matrix:
    rows: int
    cols: int
    quant: str
    def __init__(self, data: NDArray[np.uint8], cols: int, quant: str) -> None: ...
    def matmul(
        self,
        x: NDArray[Any],
        out: NDArray[np.float32],
        threads: int,
        rows: NDArray[np.int32] | None = None,
    ) -> None: ...
    def row(self, index: int, out: NDArray[np.float32]) -> None: ...

class Predictor:
    pass

class LowRank(Predictor):
    def __init__(self, fc1: Matrix, fc2: Matrix, threshold: float, pre_norm: bool) -> None: ...

class Signs(Predictor):
    def __init__(self, bits: NDArray[np.uint8], hidden: int, threshold: float) -> None: ...

class ReadError(OSError): ...

class StoredRows:
    def fetch(self, rows: NDArray[np.int32]) -> None: ...

class Store:
    READ_BYTES: int  # of one read of neighbours, at most
    GAP_BYTES: int  # between neighbours that are read together, at most
    TOGETHER: int  # neurons that a thread takes at a time
    def __init__(self, bytes: int, row_bytes: int, unit: int, readers: int) -> None: ...
    def add(self, file: int, offset: int, rows: int, alignment: int) -> StoredRows: ...
    @property
    def units(self) -> int: ...
    def take_counts(self) -> tuple[int, int, int, int, float]: ...

class Neurons:
    SPAN: int  # neurons of a span
    def __init__(
        self,
        gates: NDArray[np.uint8] | StoredRows,
        pairs: NDArray[np.uint8] | StoredRows | None,
        hidden: int,
        quants: Sequence[str],
        activation: str,
        predictor: Predictor | None = None,
        threshold: float = 0.0,
    ) -> None: ...
    def forward(
        self,
        x: NDArray[Any],
        residual: NDArray[Any],
        out: NDArray[np.float32],
        counts: NDArray[np.int32],
        mode: str,
        threads: int,
        elsewhere: NDArray[np.uint8] | None = None,
        uses: NDArray[np.int32] | None = None,
    ) -> None: ...

class Cancelled(RuntimeError): ...

class Cancel:
    def __init__(self) -> None: ...
    def set(self) -> None: ...
    def is_set(self) -> bool: ...

def cache_bytes(positions: int, layers: int, kv_heads: int, head: int) -> int: ...

class Cache:
    length: int
    context: int
    nbytes: int
    def copy(self, length: int) -> Cache: ...
    def truncate(self, length: int) -> None: ...
    def free(self) -> None: ...

class Layer:
    def __init__(
        self,
        matrices: list[Matrix],
        biases: list[NDArray[np.float32] | None],
        attention_norm: NDArray[np.float32],
        ffn_norm: NDArray[np.float32],
        router: NDArray[np.float32] | None,
        ffns: list[Neurons],
        window: int,
        attention_norm_bias: NDArray[np.float32] | None = None,
        ffn_norm_bias: NDArray[np.float32] | None = None,
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        embedding: Matrix,
        head: Matrix,
        norm: NDArray[np.float32],
        layers: list[Layer],
        frequencies: NDArray[Any],
        rope_scale: float,
        heads: int,
        kv_heads: int,
        head_dim: int,
        experts_used: int,
        norm_eps: float,
        norm_bias: NDArray[np.float32] | None = None,
    ) -> None: ...
    def new_cache(self, context: int) -> Cache: ...
    def step(
        self,
        caches: list[Cache],
        tokens: list[NDArray[np.int32]],
        every: bool,
        mode: str,
        threads: int,
        logits: NDArray[np.float32],
        counts: NDArray[np.int32],
        cancel: Cancel | None = None,
    ) -> None: ...
