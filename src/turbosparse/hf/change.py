"""Change the Combined vectors of a running model, dense or MoE, stock or ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from turbosparse.hf.families import PREFIX
from turbosparse.hf.observe import Act, OneByOne

# Combined [N, I] → what the down projection reads instead
Change = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def change_combined(model: Any, change: Change) -> Iterator[None]:
    """Let `change` replace Combined, gradients included, in each forward pass inside.

    It is called once for each layer's FFN; of a MoE layer N are the (token, expert) pairs, all at
    once or expert by expert, as the experts implementation has it.
    """
    with ExitStack() as undo:
        for block in model.model.layers:
            if hasattr(block.mlp, "experts"):
                undo.callback(_change_experts(model.config, block.mlp.experts, change))
            else:
                undo.callback(_change_dense(block.mlp, change))
        yield


def _change_dense(mlp: Any, change: Change) -> Callable[[], None]:
    def replace(_module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return change(inputs[0].flatten(0, -2)).view_as(inputs[0])

    # before the hook of an observer: it shall see what the projection reads
    handle = mlp.down_proj.register_forward_pre_hook(replace, prepend=True)
    return lambda: handle.remove()


def _change_experts(config: Any, experts: Any, change: Change) -> Callable[[], None]:
    if not config.model_type.startswith(PREFIX) and config._experts_implementation == "eager":
        raise ValueError(
            "the stock eager experts never show Combined: set_experts_implementation('grouped_mm')"
        )
    apply = experts._apply_gate

    # the instance's own, over that of the class
    experts._apply_gate = lambda gate_up: change(apply(gate_up))
    return lambda: delattr(experts, "_apply_gate")


# ((layer, expert or None), Combined [N, I], rows [N] as of `Seen`) → what is read instead
ChangeOne = Callable[[tuple[int, int | None], torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def change_each(model: Any, change: ChangeOne) -> Iterator[None]:
    """As `change_combined`, one FFN or expert at a time, whatever the experts' implementation."""
    with ExitStack() as undo:
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.mlp, "experts"):
                act = _act_and_change(layer, block.mlp.experts, change)
                undo.callback(OneByOne(block.mlp.experts, act).remove)
            else:
                undo.callback(_change_dense(block.mlp, _change_whole(layer, change)))
        yield


def _act_and_change(layer: int, experts: Any, change: ChangeOne) -> Act:
    return lambda expert, gate_up, rows: change((layer, expert), experts._apply_gate(gate_up), rows)


def _change_whole(layer: int, change: ChangeOne) -> Change:
    return lambda active: change(
        (layer, None), active, torch.arange(len(active), device=active.device)
    )


def force_sparsity(model: Any, share: float) -> Any:
    """Within it each token keeps only the entries of Combined that are largest in size.

    The mask of Turbo Sparse (eqs. 3, 4): `share` of the neurons becomes zero.
    """

    def change(active: torch.Tensor) -> torch.Tensor:
        count = active.shape[-1] - round(share * active.shape[-1])
        kept = active.abs().topk(count, -1).indices
        return torch.zeros_like(active).scatter(-1, kept, active.gather(-1, kept))

    return change_combined(model, change)


@contextmanager
def cut_gates(model: Any, most: float) -> Iterator[None]:
    """Within it a gate of at most this counts as zero (FATReLU), of a model that cuts its gates."""
    if not most:
        yield
        return
    ffns = [getattr(block.mlp, "experts", block.mlp) for block in model.model.layers]
    before = [ffn.threshold for ffn in ffns]
    try:
        for ffn in ffns:
            ffn.threshold = max(most, ffn.threshold)
        yield
    finally:
        for ffn, threshold in zip(ffns, before, strict=True):
            ffn.threshold = threshold


# (layer, expert or None, what the FFN reads [N, H], the residual before its norm [N, H]) → the
# neurons that may be active, bool [N, I]
Pick = Callable[[int, int | None, torch.Tensor, torch.Tensor], torch.Tensor]


# (Combined [N, I], layer, expert, what the FFN reads, the residual) → what is read instead
ChangeSeeing = Callable[[torch.Tensor, int, int | None, torch.Tensor, torch.Tensor], torch.Tensor]


def mask_combined(model: Any, pick: Pick) -> Any:
    """Within it the neurons that `pick` leaves out count as inactive, as in predicted mode."""
    return change_seeing(model, lambda active, *place: active * pick(*place))


@contextmanager
def change_seeing(model: Any, change: ChangeSeeing) -> Iterator[None]:
    """As `change_each`, with what the feed-forward reads."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def change_one(
        where: tuple[int, int | None], active: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        return change(active, *where, *(part[rows] for part in seen[where[0]]))

    with ExitStack() as undo:
        for layer, block in enumerate(model.model.layers):
            keep = _keep_both(seen, layer)
            undo.callback(block.post_attention_layernorm.register_forward_hook(keep).remove)
        undo.enter_context(change_each(model, change_one))
        yield


def _keep_both(
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]], layer: int
) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[layer] = output.flatten(0, -2), inputs[0].flatten(0, -2)

    return hook
