"""What a predictor is: the record in a packed folder, and its tensors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from turbosparse.hf.published import ABOVE_ZERO
from turbosparse.ops.rows import Quant


class Predictor(BaseModel):
    """How candidate neurons are picked; see `ops.reference` for the two kinds.

    `recall` and `density` are those measured on text when the predictor was made, None if never.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Literal["low_rank", "sign"]
    input: Literal["pre_norm", "post_norm"]
    threshold: FiniteFloat
    quant: Quant | None = None  # of a low_rank one's matrices
    ranks: list[list[int]] | None = None  # of a low_rank one, for each layer and expert
    recall: FiniteFloat | None = None
    density: FiniteFloat | None = None

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Self:
        low_rank = self.kind == "low_rank"
        if (self.quant is not None, self.ranks is not None) != (low_rank, low_rank):
            raise ValueError("quant and ranks belong to low_rank")
        if not low_rank and self.input != "post_norm":
            raise ValueError("sign reads post_norm")
        return self

    def __str__(self) -> str:
        recall = "" if self.recall is None else f", recall {self.recall:.1%}"
        kind = f"{self.kind} {self.quant}" if self.quant else self.kind
        least = "above 0" if self.threshold == ABOVE_ZERO else f"{self.threshold:g}"
        return f"{kind} predictor, threshold {least}{recall}"


class PackedPredictor(NamedTuple):
    """The predictor of one feed-forward; `tensors` are ``fc1`` and ``fc2``, or ``signs``."""

    about: Predictor
    tensors: dict[str, NDArray[Any]]
