"""The engine: a packed folder, opened on a backend and in a mode."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import memory_available, size_in_bytes, threads_to_use
from turbosparse.engine import native
from turbosparse.engine.cost import CHUNK
from turbosparse.engine.sampling import Sampler
from turbosparse.engine.sequence import Budget, Cancelled, Sequence
from turbosparse.engine.split import split
from turbosparse.engine.streaming import Stores, place
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.count import experts_in_use
from turbosparse.packed.format import Packed

Backend = Literal["auto", "torch", "cpu", "gpu"]
Mode = Literal["auto", "dense", "exact", "predicted"]
Logits = NDArray[np.float32]

_SMALLEST_BUDGET = 64 << 20


@dataclass(frozen=True)
class Step:
    """What one forward pass says of one sequence.

    `logits` is ``[vocabulary]`` after its last token. `layers` is ``[layers, 3]``, shares of the
    neurons in use, mean over its tokens: that a predictor let through (else 1), with positive
    gate, and active (Combined is not zero). `candidates`, `gate_positive` and `active` are their
    means.
    """

    logits: Logits
    layers: NDArray[np.float64]

    @property
    def candidates(self) -> float:
        return float(self.layers[:, 0].mean())

    @property
    def gate_positive(self) -> float:
        return float(self.layers[:, 1].mean())

    @property
    def active(self) -> float:
        return float(self.layers[:, 2].mean())


class Engine:
    """A packed model ready to generate. Several threads may use it: steps take turns.

    Args:
        folder: packed folder.
        backend: ``cpu`` is the C++ core, ``torch`` the reference on dequantised weights, ``gpu``
            Triton kernels on an NVIDIA card; ``auto`` takes the core.
        mode: ``exact`` skips neurons that are exactly zero, ``predicted`` also those that the
            folder's predictor does not pick, ``dense`` reads all; ``auto`` takes predicted where
            the predictor was measured to pay (`Predictor.pays`), else exact where the activation
            has exact zeros.
        threads: of the C++ core; by default the processors that this process may use.
        kv_bytes: budget of the key-value caches of all sequences; by default half of the memory
            (of the card on ``gpu``) that is available beside the weights.
        memory: bytes, or a text like ``8GiB``, that the process may take with all this. A model
            that is larger runs from disk: see `streaming`.
        gpu_memory: of the card, for the gpu backend. The neurons that do not fit stay on the
            processor: see `split`.

    Raises:
        TurboSparseError: damaged folder, or a mode that the model does not have.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        backend: Backend = "auto",
        mode: Mode = "auto",
        threads: int | None = None,
        kv_bytes: int | None = None,
        memory: int | str | None = None,
        gpu_memory: int | str | None = None,
    ):
        if mode not in get_args(Mode):
            raise TurboSparseError(f"mode {mode!r} is unknown; use {', '.join(get_args(Mode))}")
        if backend not in get_args(Backend):
            known = ", ".join(get_args(Backend))
            raise TurboSparseError(f"backend {backend!r} is unknown; use {known}")
        if kv_bytes is not None and kv_bytes < 1:
            raise TurboSparseError(f"--kv-bytes {kv_bytes} must be 1 or more")
        if gpu_memory is not None and backend != "gpu":
            raise TurboSparseError(f"--gpu-memory needs --backend gpu, not {backend}")
        self.packed = Packed(folder)
        self.mode = _mode(self.packed, mode)
        self.backend = "cpu" if backend == "auto" else backend
        self.threads = threads_to_use(threads)
        self.config = self.packed.config
        self.context = int(self.config.context)
        self.stores: Stores | None = None
        if memory is not None:
            kv_bytes = self._limit(size_in_bytes(memory, "--memory"), kv_bytes)
        self.decoder: Any
        if self.backend == "cpu":
            self.decoder = native.Decoder(self.packed, threads=self.threads, stores=self.stores)
            self.runs_on = f"cpu ({self.decoder.isa})"
        elif self.backend == "gpu":
            from turbosparse.engine import gpu

            parts = None
            if gpu_memory is not None:
                size = size_in_bytes(gpu_memory, "--gpu-memory")
                parts = split(self.packed, size, kv_bytes)
                kv_bytes = parts.keys_values
            self.decoder = gpu.Decoder(self.packed, split=parts, threads=self.threads)
            self.runs_on = f"gpu ({self.decoder.name})"
            kv_bytes = kv_bytes or self.decoder.memory_free() // 2
        else:
            from turbosparse.engine import model

            self.decoder = model.Decoder(self.packed)
            self.runs_on = self.backend
        self.budget = Budget(kv_bytes or _default_budget(self.packed))
        self._turn = threading.Lock()

    def _limit(self, memory: int, kv_bytes: int | None) -> int | None:
        """Keep the weights that do not fit on disk; returns the budget of the caches."""
        if self.backend != "cpu":
            raise TurboSparseError(f"--memory needs the cpu backend, not {self.backend}")
        placement = place(self.packed, memory, self.mode, self.threads, kv_bytes)
        if placement is None:
            return kv_bytes
        self.stores = Stores(self.packed, placement)
        return placement.keys_values

    def describe(self) -> str:
        stored = f", {self.stores}" if self.stores else ""
        return (
            f"{self.packed.folder.name}: {self.packed.activation} {self.packed.quant}, "
            f"backend {self.runs_on}, mode {self.mode}{self._predictor()}, "
            f"{self.threads} thread{'s' * (self.threads != 1)}, "
            f"key-value cache at most {self.budget.limit / 1e9:.2g} GB{stored}"
        )

    def _predictor(self) -> str:
        predictor = self.packed.header.ffn.predictor
        return f" ({predictor})" if predictor and self.mode == "predicted" else ""

    def sequence(
        self,
        tokens: Iterable[int] = (),
        *,
        context: int | None = None,
        sampler: Sampler | None = None,
    ) -> Sequence:
        """A new text that begins with these tokens.

        Args:
            tokens: read by the first step.
            context: positions that it may take, at most and by default those of the model.
            sampler: chooses its tokens; greedy by default.
        """
        sequence = Sequence(self, min(context or self.context, self.context), sampler)
        sequence.extend(tokens)
        return sequence

    def check_tokens(self, tokens: Iterable[int]) -> list[int]:
        """The tokens as whole numbers inside the vocabulary.

        Raises:
            TurboSparseError: names the first that is not.
        """
        vocabulary, found = self.config.vocab_size, []
        for token in tokens:
            try:
                found.append(index(token))
            except TypeError:
                raise TurboSparseError(f"token {token!r} is not a whole number") from None
            if not 0 <= found[-1] < vocabulary:
                raise TurboSparseError(
                    f"token {token} is outside the model's vocabulary of {vocabulary}; "
                    "use the tokenizer that belongs to the model"
                )
        return found

    def step(self, sequences: Iterable[Sequence], *, chunk: int = CHUNK) -> list[Step]:
        """Read the pending tokens of all sequences together; a weight row is read once for all.

        A long prompt is read in passes of up to `chunk` tokens.

        Raises:
            TurboSparseError: nothing is pending, the budget or the memory is exhausted, a weight
                file was changed, or logits that are not finite.
            Cancelled: a sequence was cancelled. The passes before are kept: step again without it.
        """
        sequences = list(sequences)
        if any(not sequence.pending for sequence in sequences):
            raise TurboSparseError("a sequence has no pending token; extend it first")
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise TurboSparseError("a sequence was given twice")
        steps: dict[int, Step] = {}
        while waiting := [sequence for sequence in sequences if sequence.pending]:
            counts = [min(chunk, len(sequence.pending)) for sequence in waiting]
            for sequence, step in zip(waiting, self.advance(waiting, counts), strict=True):
                steps[id(sequence)] = step
        return [steps[id(sequence)] for sequence in sequences]

    def advance(self, sequences: list[Sequence], counts: list[int]) -> list[Step]:
        """One pass: read the next `counts` pending tokens, at least one, of each sequence.

        Raises:
            As `step`; a pass that fails changes nothing.
        """
        logits, used = self._pass(sequences, counts)
        neurons = self.config.intermediate_size * experts_in_use(self.config)
        parts = np.split(used, np.cumsum(counts)[:-1], axis=1)
        return [
            Step(row, part.mean(axis=1) / neurons) for row, part in zip(logits, parts, strict=True)
        ]

    def verify(self, sequence: Sequence) -> list[Step]:
        """One pass over the pending tokens of a text, with a Step after each of them.

        Raises:
            As `step`; a pass that fails changes nothing.
        """
        ((logits, used),) = self.every([sequence], [len(sequence.pending)])
        neurons = self.config.intermediate_size * experts_in_use(self.config)
        return [
            Step(row, of / neurons) for row, of in zip(logits, used.swapaxes(0, 1), strict=True)
        ]

    def every(
        self, sequences: list[Sequence], counts: list[int]
    ) -> list[tuple[Logits, NDArray[np.int32]]]:
        """As `advance`, of each sequence with logits after every token that is read.

        Returns:
            Logits ``[count, vocabulary]`` and neurons used ``[layers, count, 3]``: see `Step`.
        """
        logits, used = self._pass(sequences, counts, every=True)
        ends = np.cumsum(counts)[:-1]
        return list(zip(np.split(logits, ends), np.split(used, ends, axis=1), strict=True))

    def logits(self, tokens: Iterable[int]) -> Iterator[Logits]:
        """Logits after every token of a text, in pieces ``[some tokens, vocabulary]``."""
        return (logits for logits, _ in self.read(tokens))

    def read(self, tokens: Iterable[int]) -> Iterator[tuple[Logits, NDArray[np.int32]]]:
        """As `logits`, with the neurons used, ``[layers, some tokens, 3]``: see `Step`."""
        with self.sequence(tokens) as sequence:
            while pending := len(sequence.pending):
                yield from self.every([sequence], [min(self.width, pending)])

    @property
    def width(self) -> int:
        """Tokens of a pass that keeps the logits of every one in little memory."""
        return max(1, min(CHUNK, (64 << 20) // (4 * self.config.vocab_size)))

    def _pass(
        self, sequences: list[Sequence], counts: list[int], *, every: bool = False
    ) -> tuple[Logits, NDArray[np.int32]]:
        with self._turn:
            self.packed.check_unchanged()
            flag = self.decoder.new_cancel()
            for sequence in sequences:
                sequence.cancel_step = flag
            try:
                if any(sequence.cancelled for sequence in sequences):
                    raise Cancelled("a sequence of this step was cancelled")
                self.budget.reserve(
                    [
                        (s, self.decoder.cache_bytes(s.length + count, s.context))
                        for s, count in zip(sequences, counts, strict=True)
                    ]
                )
                logits, used = self.decoder.step(
                    [s.pending[:count] for s, count in zip(sequences, counts, strict=True)],
                    [s.cache for s in sequences],
                    mode=self.mode,
                    every=every,
                    cancel=flag,
                )
                if self.stores:  # what was read during the pass is from the files as they were
                    self.packed.check_unchanged()
            finally:
                for sequence in sequences:
                    sequence.cancel_step = None
        if not np.isfinite(logits).all():
            raise TurboSparseError(
                f"{self.packed.folder}: the logits are not finite (NaN or infinity): the weights "
                "are damaged or too large; pack the model again, or use another --quant"
            )
        return logits, used


def _default_budget(packed: Packed) -> int:
    weights = sum(file.bytes for file in packed.header.files.values())
    return max(_SMALLEST_BUDGET, (memory_available() - weights) // 2)


def has_modes(packed: Packed, asked: Mode) -> list[ops.Mode]:
    """The modes that a model has, or the one that is asked for; raises as `Engine`."""
    if asked != "auto":
        return [_mode(packed, asked)]
    sparse: list[ops.Mode] = [] if packed.activation in WITHOUT_ZEROS else ["exact"]
    predicted: list[ops.Mode] = ["predicted"] if packed.header.ffn.predictor and sparse else []
    return ["dense", *sparse, *predicted]


def _mode(packed: Packed, asked: Mode) -> ops.Mode:
    """The mode to run in.

    Raises:
        TurboSparseError: the model does not have the mode that was asked for.
    """
    sparse = packed.activation not in WITHOUT_ZEROS
    predictor = packed.header.ffn.predictor
    if asked in ("exact", "predicted") and not sparse:
        raise TurboSparseError(
            f"{packed.folder} is a {packed.activation} model: it has no exact zeros to skip; "
            "use --mode dense"
        )
    if asked == "predicted" and predictor is None:
        raise TurboSparseError(
            f"{packed.folder} holds no predictor; pack a model that has one merged, or pack it "
            "with --predictor sign"
        )
    if asked != "auto":
        return asked
    if predictor and predictor.pays:
        return "predicted"
    return "exact" if sparse else "dense"
