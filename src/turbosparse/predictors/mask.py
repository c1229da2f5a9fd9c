"""The predictor of a model folder in PyTorch, and the model with it applied.

Shapes: N tokens, H hidden, I neurons, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import linear, relu

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.hf.change import mask_combined
from turbosparse.hf.checkpoint import Checkpoint
from turbosparse.hf.load import activation_of
from turbosparse.hf.published import own_fields
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import row_bytes


class Scorer(NamedTuple):
    """What scores the neurons of one feed-forward: those of at least its threshold are candidates.

    `parts` are fc1 ``[R, H]`` and fc2 ``[I, R]`` of low_rank, or, of sign, the signs (1 or -1) of
    the matrices that decide, ``[I, H]`` each.
    """

    kind: str
    reads: str
    parts: tuple[Tensor, ...]
    threshold: float = 0.0

    @classmethod
    def of_signs(cls, rows: Iterable[Tensor]) -> Self:
        """The predictor that compares the signs of x with those of these matrices."""
        return cls("sign", "post_norm", tuple(1.0 - 2 * (row < 0).float() for row in rows))

    def scores(self, h: Tensor) -> Tensor:
        """Float32 ``[N, I]`` of what it reads, ``[N, H]``."""
        h = h.float()
        if self.kind == "sign":
            signs = 1.0 - 2 * (h < 0).float()
            return torch.stack([linear(signs, part) for part in self.parts]).amin(0) / h.shape[1]
        fc1, fc2 = self.parts
        return linear(relu(linear(h, fc1)), fc2)

    def pick(self, x: Tensor, residual: Tensor) -> Tensor:
        """The candidates, bool ``[N, I]``, of what the feed-forward reads and the residual."""
        return ~(self.scores(self.reading(x, residual)) < self.threshold)  # a NaN is one

    def reading(self, x: Tensor, residual: Tensor) -> Tensor:
        """The one of the two that it reads."""
        return residual if self.reads == "pre_norm" else x


def scorers(checkpoint: Checkpoint, config: Any, about: Predictor, layer: int) -> list[Scorer]:
    """Of each feed-forward of a layer; `about` is the record of the folder's predictor."""
    name = families.table(config).name
    decide = ACTIVATIONS[activation_of(config)].zero_by
    found = []
    for slot in [slot for slot in families.ffns(config) if slot[0] == layer]:
        if about.kind == "sign":
            scorer = Scorer.of_signs(checkpoint[name(part, *slot)] for part in decide)
        else:
            parts = tuple(checkpoint[name(part, *slot)].float() for part in ("fc1", "fc2"))
            scorer = Scorer(about.kind, about.input, parts)
        own = about.of(*slot).threshold
        assert not isinstance(own, list)
        found.append(scorer._replace(threshold=own))
    return found


@contextmanager
def predicted(model: Any, folder: Path) -> Iterator[None]:
    """Within it a model applies the predictor of its folder, as the engine's predicted mode does.

    Raises:
        TurboSparseError: the folder holds none.
    """
    config, checkpoint = model.config, Checkpoint(folder)
    about = predictor_of(config, checkpoint)
    each = [scorers(checkpoint, config, about, n) for n in range(config.num_hidden_layers)]

    def pick(layer: int, expert: int | None, x: Tensor, residual: Tensor) -> Tensor:
        return each[layer][expert or 0].pick(x, residual)

    with mask_combined(model, pick):
        yield


def predictor_of(config: Any, checkpoint: Checkpoint, quant: str = "f16") -> Predictor:
    """The record of the predictor of a folder.

    Raises:
        TurboSparseError: there is none.
    """
    about = find_predictor(config, checkpoint, quant=quant)
    if about is None:
        raise TurboSparseError(
            f"{checkpoint.folder} holds no predictor; make one with `turbosparse predictor train`"
        )
    return about


def find_predictor(
    config: Any,
    checkpoint: Checkpoint,
    choice: str = "auto",
    quant: str = "f16",
    reads: str | None = None,
    block: Any = None,
) -> Predictor | None:
    """The record of the predictor to pack; what `block` says of one of its kind holds."""
    if block is None:
        block = own_fields(checkpoint.folder).get("predictor", {})
    if choice == "auto" and isinstance(block, dict) and block.get("kind") == "sign":
        choice = "sign"
    ranks = None if choice == "sign" else checkpoint.predictor_ranks(config)
    if reads and ranks is None:
        raise TurboSparseError(
            f"--predictor-input is for a merged predictor, and {checkpoint.folder} holds none"
        )
    if choice == "none" or (choice == "auto" and ranks is None):
        return None
    if (activation := activation_of(config)) in WITHOUT_ZEROS:
        raise TurboSparseError(
            f"{checkpoint.folder} is a {activation} model: it has no zeros to predict; "
            "use --predictor none"
        )
    kind: dict[str, Any] = {"kind": "sign"}
    if ranks is not None:
        kind = {"kind": "low_rank", "quant": quant, "ranks": ranks}
        for rank in {rank for layer in ranks for rank in layer}:
            row_bytes(quant, rank)  # raises unless it is a multiple of a block
    try:
        said = block if block.get("kind", "low_rank") == kind["kind"] else {}
        reads = reads or said.get("input", "post_norm")
        return Predictor.model_validate({"threshold": 0.0} | said | kind | {"input": reads})
    except (ValidationError, AttributeError, TypeError) as error:
        raise TurboSparseError(
            f'{checkpoint.folder / "config.json"}: the block "predictor" is not valid: {error}'
        ) from error
