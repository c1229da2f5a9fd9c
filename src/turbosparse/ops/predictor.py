"""What a predictor is: the record in a packed folder, and its tensors."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, NamedTuple, Self

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from turbosparse.hf.published import ABOVE_ZERO
from turbosparse.ops.rows import Quant

BOUND = 1.001  # of the perplexity, as a multiple of that without the predictor


class Predictor(BaseModel):
    """How candidate neurons are picked; see `ops.reference` for the two kinds.

    What stands behind `ranks` was measured on text, and is None if it never was: `recall` of the
    active neurons, and `norm_recall`, each weighted by the square of what it adds to the output;
    `density`, the share of candidates; `perplexity` with the predictor ÷ that without it; `bytes`
    of the feed-forwards ÷ those of exact mode. `bound` is the perplexity that the user allows.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Literal["low_rank", "sign"]
    input: Literal["pre_norm", "post_norm"]
    threshold: FiniteFloat | list[list[FiniteFloat]]  # or one for each layer and expert
    quant: Quant | None = None  # of a low_rank one's matrices
    ranks: list[list[int]] | None = None  # of a low_rank one, for each layer and expert
    recall: FiniteFloat | None = None
    norm_recall: FiniteFloat | None = None
    density: FiniteFloat | None = None
    perplexity: FiniteFloat | None = None
    bytes: FiniteFloat | None = None
    bound: FiniteFloat = BOUND

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Self:
        low_rank = self.kind == "low_rank"
        if (self.quant is not None, self.ranks is not None) != (low_rank, low_rank):
            raise ValueError("quant and ranks belong to low_rank")
        if not low_rank and self.input != "post_norm":
            raise ValueError("sign reads post_norm")
        return self

    def of(self, layer: int, expert: int | None) -> Self:
        """The record of one feed-forward, with its own threshold."""
        if not isinstance(self.threshold, list):
            return self
        return self.model_copy(update={"threshold": self.threshold[layer][expert or 0]})

    @property
    def pays(self) -> bool:
        """Whether it was measured to save bytes at no more perplexity than the user allows."""
        return (self.perplexity or inf) <= self.bound and (self.bytes or inf) < 1

    def __str__(self) -> str:
        recall = "" if self.recall is None else f", recall {self.recall:.1%}"
        kind = f"{self.kind} {self.quant}" if self.quant else self.kind
        measured = "" if self.perplexity is None else f", perplexity {self.perplexity - 1:+.2%}"
        return f"{kind} predictor, threshold {self.least}{recall}{measured}"

    @property
    def least(self) -> str:
        """The threshold in words."""
        if isinstance(self.threshold, list):
            each = [threshold for layer in self.threshold for threshold in layer]
            return f"{min(each):.3g} to {max(each):.3g}"
        return "above 0" if self.threshold == ABOVE_ZERO else f"{self.threshold:g}"


class PackedPredictor(NamedTuple):
    """The predictor of one feed-forward; `tensors` are ``fc1`` and ``fc2``, or ``signs``."""

    about: Predictor
    tensors: dict[str, NDArray[Any]]

    @property
    def threshold(self) -> float:
        assert not isinstance(self.about.threshold, list)  # it is of one feed-forward
        return self.about.threshold

    @property
    def of_neurons(self) -> NDArray[Any]:
        """The tensor that has a row for each neuron."""
        return self.tensors["signs" if self.about.kind == "sign" else "fc2"]

    def first(self, neurons: int) -> Self:
        """That of the first neurons alone."""
        own = dict(self.tensors)
        own["signs" if self.about.kind == "sign" else "fc2"] = self.of_neurons[:neurons]
        return type(self)(self.about, own)
