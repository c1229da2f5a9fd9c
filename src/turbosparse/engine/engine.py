"""The engine: a packed folder, opened on a backend and in a mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import threads_to_use
from turbosparse.engine import model, native
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.packed.format import Packed

Backend = Literal["auto", "torch", "cpu"]
Mode = Literal["auto", "dense", "exact", "predicted"]

# Recall, as measured when a predictor was made, from which `auto` trusts it: what a layer misses
# the next ones miss too, and over 32 layers 1 % each is a quarter.
TRUSTED_RECALL = 0.99


@dataclass(frozen=True)
class Step:
    """One forward pass.

    `logits` is float32 ``[vocabulary]`` of the last token; `active` the share of neurons whose
    Combined is not zero, `gate_positive` the share with positive gate and `candidates` the share
    that a predictor let through (else 1), over the neurons in use of all layers and tokens.
    """

    logits: Tensor
    active: float
    gate_positive: float
    candidates: float


class Cache(Protocol):
    """The state of one sequence, of the kind that its decoder made."""

    @property
    def length(self) -> int: ...


class Decoder(Protocol):
    """What `model.Decoder` and `native.Decoder` have in common."""

    def new_cache(self, context: int) -> Any: ...

    def __call__(
        self, tokens: list[int], cache: Any, *, mode: ops.Mode, every: bool = False
    ) -> tuple[Tensor, Tensor]: ...


class Engine:
    """A packed model ready to generate.

    Args:
        folder: packed folder.
        backend: ``cpu`` is the C++ core, ``torch`` the reference on dequantised weights; ``auto``
            takes the core.
        mode: ``exact`` skips neurons that are exactly zero, ``predicted`` also those that the
            folder's predictor does not pick, ``dense`` reads all; ``auto`` takes predicted where
            the predictor's measured recall is at least `TRUSTED_RECALL`, else exact where the
            activation has exact zeros.
        threads: of the C++ core; by default the processors that this process may use.

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
    ):
        if mode not in get_args(Mode):
            raise TurboSparseError(f"mode {mode!r} is unknown; use {', '.join(get_args(Mode))}")
        self.packed = Packed(folder)
        self.mode = _mode(self.packed, mode)
        self.backend = "cpu" if backend == "auto" else backend
        self.threads = threads_to_use(threads)
        self.config = self.packed.config
        self.context = int(self.config.max_position_embeddings)
        self.decoder: Decoder
        if self.backend == "cpu":
            self.decoder = native.Decoder(self.packed, threads=self.threads)
            self.runs_on = f"cpu ({self.decoder.isa})"
        else:
            self.decoder = model.Decoder(self.packed, backend=self.backend, threads=self.threads)
            self.runs_on = self.backend

    def describe(self) -> str:
        return (
            f"{self.packed.folder.name}: {self.packed.activation} {self.packed.quant}, "
            f"backend {self.runs_on}, mode {self.mode}{self._predictor()}, "
            f"{self.threads} thread{'s' * (self.threads != 1)}"
        )

    def _predictor(self) -> str:
        predictor = self.packed.header.ffn.predictor
        return f" ({predictor})" if predictor and self.mode == "predicted" else ""

    def new_cache(self) -> Cache:
        cache: Cache = self.decoder.new_cache(self.context)
        return cache

    def step(self, tokens: list[int], cache: Cache) -> Step:
        """Read `tokens` after what `cache` holds and return the logits that follow.

        Raises:
            TurboSparseError: a token outside the vocabulary, or a full context.
        """
        vocabulary = self.config.vocab_size
        foreign = [token for token in tokens if not 0 <= token < vocabulary]
        if foreign:
            raise TurboSparseError(
                f"token {foreign[0]} is outside the model's vocabulary of {vocabulary}; "
                "use the tokenizer that belongs to the model"
            )
        logits, counts = self.decoder(tokens, cache, mode=self.mode)
        # a token of a MoE model uses the neurons of several experts
        used = self.config.intermediate_size * getattr(self.config, "num_experts_per_tok", 1)
        candidates, gate, active = (counts.double().mean((0, 1)) / used).tolist()
        return Step(logits[-1], active, gate, candidates)

    def prefill(self, tokens: list[int], cache: Cache, *, chunk: int = 512) -> Step:
        """Read a prompt in chunks of up to `chunk` tokens."""
        step = None
        for start in range(0, len(tokens), chunk):
            step = self.step(tokens[start : start + chunk], cache)
        if step is None:
            raise TurboSparseError("the prompt holds no token, and the model has no start token")
        return step


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
    if predictor and (predictor.recall or 0) >= TRUSTED_RECALL:
        return "predicted"
    return "exact" if sparse else "dense"
