"""A card as the processor beside it sees it: work that is begun, and what is sent meanwhile.

On a GPU the order is that of its stream, and copies go through page-locked memory. Where there is
none, threads stand in: one does the card's work in order, another carries weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Arrays = Sequence[NDArray[Any]]


def card(device: torch.device) -> Card:
    return Gpu(device) if device.type == "cuda" else Card()


class Card:
    """What stands in for one: memory of the processor, and threads."""

    def __init__(self) -> None:
        self._stream, self._carrier = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
        """Begin to copy tensors to the processor; the result waits for them."""
        return self._stream.submit(lambda: [tensor.numpy() for tensor in tensors]).result

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin work on the card; what the result gives is for further work on it."""

        def run() -> T:
            with torch.inference_mode():
                return work()

        return self._stream.submit(run).result

    def give(self, arrays: Arrays) -> list[Tensor]:
        """Copies of the arrays for work on the card."""
        return [torch.from_numpy(array.copy()) for array in arrays]

    def carry(self, arrays: Arrays) -> Future[list[Tensor]]:
        """Begin to copy weights to the card, beside its work and the processor's."""
        return self._carrier.submit(self.give, arrays)


class Gpu(Card):
    """Not run on one yet."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._beside = device, torch.cuda.Stream(device)

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
        copies, arrived = [_locked(one.shape, one.dtype) for one in tensors], torch.cuda.Event()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        arrived.record()

        def wait() -> Arrays:
            arrived.synchronize()
            return [copy.numpy() for copy in copies]

        return wait

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        result = work()  # queues kernels, and waits for none
        return lambda: result

    def give(self, arrays: Arrays) -> list[Tensor]:
        sent = []
        for array in arrays:
            locked = _locked(array.shape, torch.from_numpy(np.empty(0, array.dtype)).dtype)
            locked.numpy()[...] = array
            sent.append(locked.to(self._device, non_blocking=True))
        return sent

    def carry(self, arrays: Arrays) -> Future[list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.cuda.stream(self._beside):
                sent = self.give(arrays)
            self._beside.synchronize()
            for tensor in sent:  # or its memory could be another's before the stream has read it
                tensor.record_stream(torch.cuda.default_stream(self._device))
            return sent

        return self._carrier.submit(run)


def _locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    # torch keeps such memory for the next tensor, and gives it away only when its copy has ended
    return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=True)
