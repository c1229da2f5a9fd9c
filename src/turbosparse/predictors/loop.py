"""The predictor in the loop: trained beside the model, and at last with its mask applied.

So the model learns to do without the neurons that are not found, and the predictor to find those
that count. Off unless a recipe has `predictor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import note
from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.change import change_seeing
from turbosparse.hf.checkpoint import PREDICTOR, Checkpoint
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import activation_of
from turbosparse.hf.surgery import weights_of
from turbosparse.predictors.fit import loss_of
from turbosparse.predictors.mask import Scorer, predictor_of, scorers
from turbosparse.predictors.rows import carrying, shares_of
from turbosparse.training.l1 import Penalty, Sums
from turbosparse.training.recipe import Recipe


def in_the_loop(recipe: Recipe, model: Any, device: Any = "cpu") -> Loop | None:
    """The predictor of the folder that a recipe starts from, if the recipe says to train it.

    Raises:
        TurboSparseError: the folder holds none, or one of signs, which has nothing to train.
    """
    if recipe.predictor is None:
        return None
    if (activation := activation_of(model.config)) in WITHOUT_ZEROS:
        note(f"{activation} has no zeros: the recipe's predictor is left out")
        return None
    folder, steps, how = model_folder(str(recipe.model)), recipe.steps(), recipe.predictor
    first = steps - round(how.share * steps)
    return Loop(model, folder, weight=how.weight, carry=how.carry, first=first, device=device)


class Loop(Penalty):
    """`weight` × the mean loss of the scores of all neurons; after `first` steps, with the mask.

    Its thresholds stay those of the folder. The mask has the gradient of a sigmoid around them
    (straight-through), so that the loss of the tokens too says which neurons to find.
    """

    name = "predictor"

    def __init__(
        self, model: Any, folder: Path, *, weight: float, carry: float, first: int, device: Any
    ):
        super().__init__(weight)
        self._carry, self._first, config = carry, first, model.config
        checkpoint = Checkpoint(folder)
        about = predictor_of(config, checkpoint)
        if about.kind != "low_rank":
            raise TurboSparseError(
                f"{folder} holds a predictor of the kind {about.kind}, which has nothing to train; "
                "give a model with one of another kind, or a recipe without predictor"
            )
        self._scorers: dict[tuple[int, int | None], Scorer] = {}
        self._units: dict[str, Tensor] = {}  # that fc1 counts in: one learning rate suits all then
        self._parts: dict[str, Tensor] = {}  # what is trained, by name
        name = families.table(config).name
        found = [scorers(checkpoint, config, about, n) for n in range(config.num_hidden_layers)]
        for layer, expert in families.ffns(config):
            scorer = found[layer][expert or 0]
            fc1, fc2 = scorer.parts
            unit = fc1.square().mean().sqrt().clamp(min=1e-10) * fc1.shape[1] ** 0.5
            parts = tuple(part.to(device).requires_grad_() for part in (fc1 / unit, fc2))
            self._scorers[layer, expert] = scorer._replace(parts=parts)
            names = [name(role, layer, expert) for role in ("fc1", "fc2")]
            self._parts |= zip(names, parts, strict=True)
            self._units[names[0]] = unit.to(device)
        self.clear_gradients()

    @contextmanager
    def watch(self, model: Any, step: int) -> Iterator[Sums]:
        """Gather the loss of each feed-forward's scores; masks Combined if it is time."""
        sums: Sums = []
        name = families.table(model.config).name
        downs = [[ffn.down for ffn in weights_of(block.mlp)] for block in model.model.layers]

        def change(
            active: Tensor, layer: int, expert: int | None, x: Tensor, residual: Tensor
        ) -> Tensor:
            scorer = self._scorers[layer, expert]
            unit = self._units[name("fc1", layer, expert)]
            scores = scorer.scores(scorer.reading(x, residual) * unit).float()
            with torch.no_grad():
                shares = shares_of(active.float(), downs[layer][expert or 0])
                wanted = carrying(shares, self._carry)
            loss = loss_of(scores, wanted, wanted.float().mean())
            sums.append((loss.sum(), loss.numel()))
            if step < self._first:
                return active
            picked, soft = ~(scores < scorer.threshold), (scores - scorer.threshold).sigmoid()
            return active * (picked + (soft - soft.detach())).to(active.dtype)

        with change_seeing(model, change):
            yield sums

    def parameters(self) -> list[Tensor]:
        return list(self._parts.values())

    def clear_gradients(self) -> None:
        """Zeros, not none: an expert without a token shall not differ between processes."""
        for part in self._parts.values():
            part.grad = torch.zeros_like(part)

    def save(self, checkpoint: Path) -> None:
        save_file(
            {name: part.detach() for name, part in self._parts.items()}, checkpoint / PREDICTOR
        )

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        for name, stored in load_file(checkpoint / PREDICTOR).items():
            self._parts[name].copy_(stored)

    def tensors(self) -> dict[str, Tensor]:
        """The predictor as it is now, by the names of a model folder."""
        units = self._units
        return {
            name: (part.detach() * units.get(name, 1)).cpu() for name, part in self._parts.items()
        }
