"""The C++ core (csrc/bindings.cpp). Arrays are taken as they are: another dtype or stride raises."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class Matrix:
    rows: int
    cols: int
    quant: str
    def __init__(self, data: NDArray[np.uint8], cols: int, quant: str) -> None: ...
    def matmul(self, x: NDArray[Any], out: NDArray[np.float32], threads: int) -> None: ...
    def row(self, index: int, out: NDArray[np.float32]) -> None: ...

class Neurons:
    def __init__(
        self, data: NDArray[np.uint8], hidden: int, quant: str, activation: str
    ) -> None: ...
    def forward(
        self,
        x: NDArray[Any],
        out: NDArray[np.float32],
        counts: NDArray[np.int32],
        exact: bool,
        threads: int,
    ) -> None: ...
