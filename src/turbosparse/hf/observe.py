"""Watch or change the Combined vectors of a running model, dense or MoE, stock or ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.families import PREFIX
from turbosparse.hf.load import activation_of


class Seen(NamedTuple):
    """What one FFN, or one routed expert, did in a forward pass; of an ungated one up is gate."""

    layer: int
    expert: int | None
    gate: torch.Tensor  # [N, I]
    up: torch.Tensor  # [N, I]
    combined: torch.Tensor  # [N, I]
    rows: torch.Tensor  # [N]: which of the batch's B·T tokens


See = Callable[[Seen], None]
# (layer, router logits [N, E], the experts that each token goes to [N, k])
SeeRouter = Callable[[int, torch.Tensor, torch.Tensor], None]
# (what reads it: qkv, o, ffn or head, layer, the batch's inputs [B·T, cols])
SeeInput = Callable[[str, int, torch.Tensor], None]


@contextmanager
def observe_ffn(model: Any, see: See, *, apart: bool = False) -> Iterator[None]:
    """Call `see` for each layer's FFN, or for every routed expert, in each forward pass inside.

    With `apart` experts run one after the other, whatever their implementation, and none computes
    anything twice.
    """
    gate = ACTIVATIONS[activation_of(model.config)].parts[0]
    with ExitStack() as undo:
        for layer, block in enumerate(model.model.layers):
            mlp = block.mlp
            if hasattr(mlp, "experts"):
                act = _act_and_see(layer, gate, mlp.experts, see)
                watch = _OneByOne(mlp.experts, act) if apart else _watch_experts(mlp.experts, act)
                undo.callback(watch.remove)
                continue
            kept: dict[str, torch.Tensor] = {}
            for part in {gate, "up"}:
                projection = getattr(mlp, f"{part}_proj")
                undo.callback(projection.register_forward_hook(_keep(kept, part)).remove)
            watch = _watch_dense(layer, gate, kept, see)
            undo.callback(mlp.down_proj.register_forward_pre_hook(watch).remove)
        yield


@contextmanager
def observe_routers(model: Any, see: SeeRouter) -> Iterator[None]:
    """Call `see` for each layer's router in each forward pass inside; dense models have none."""
    with ExitStack() as undo:
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.mlp, "experts"):
                watch = _watch_router(layer, see)
                undo.callback(block.mlp.gate.register_forward_hook(watch).remove)
        yield


@contextmanager
def observe_inputs(model: Any, see: SeeInput) -> Iterator[None]:
    """Call `see` for what the matrices of each layer and the head multiply, in each forward pass.

    The experts of a layer have one input, of all tokens.
    """
    places = [("head", 0, model.lm_head)] if hasattr(model, "lm_head") else []
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        parts = {"qkv": attention.q_proj, "o": attention.o_proj, "ffn": block.mlp}
        places += [(kind, layer, module) for kind, module in parts.items()]
    with ExitStack() as undo:
        for kind, layer, module in places:
            watch = _watch_input(kind, layer, see)
            undo.callback(module.register_forward_pre_hook(watch).remove)
        yield


def _watch_input(kind: str, layer: int, see: SeeInput) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        see(kind, layer, inputs[0].detach().flatten(0, -2))

    return hook


def _recomputing() -> bool:
    """Whether a checkpointed layer runs for the second time, inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _watch_router(layer: int, see: SeeRouter) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        if not _recomputing():
            see(layer, output[0].detach(), output[2])

    return hook


def _keep(kept: dict[str, torch.Tensor], part: str) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if not _recomputing():
            kept[part] = output.detach().flatten(0, -2)

    return hook


def _watch_dense(
    layer: int, gate: str, kept: dict[str, torch.Tensor], see: See
) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if _recomputing():
            return
        active = inputs[0].detach().flatten(0, -2)
        rows = torch.arange(len(active), device=active.device)
        see(Seen(layer, None, kept[gate], kept["up"], active, rows))
        kept.clear()

    return hook


# (expert, gate and up [N, 2·I], rows [N]) → Combined
Act = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def _act_and_see(layer: int, gate: str, experts: Any, see: See) -> Act:
    def act(expert: int, gate_up: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        halves = dict(zip(("gate", "up"), gate_up.chunk(2, -1), strict=True))
        active: torch.Tensor = experts._apply_gate(gate_up)
        see(Seen(layer, expert, halves[gate], halves["up"], active, rows))
        return active

    return act


def _watch_experts(experts: Any, act: Act) -> Any:
    # The fused implementations never show an expert's Combined: it is computed again, from the same
    # input.
    @torch.no_grad()
    def hook(_experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if _recomputing():
            return
        x, chosen = inputs[0], inputs[1]
        for expert in chosen.unique().tolist():
            rows = torch.where((chosen == expert).any(-1))[0]
            act(expert, linear(x[rows], experts.gate_up_proj[expert]), rows)

    return experts.register_forward_pre_hook(hook)


class _OneByOne:
    """Experts that run one after the other until it is removed."""

    def __init__(self, experts: Any, act: Act):
        self._experts, self._act = experts, act
        experts.forward = self._forward

    def _forward(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        experts, out = self._experts, torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, slots = torch.where(chosen == expert)
            active = self._act(expert, linear(x[rows], experts.gate_up_proj[expert]), rows)
            y = linear(active, experts.down_proj[expert]) * weights[rows, slots, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out

    def remove(self) -> None:
        del self._experts.forward


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
                undo.callback(_OneByOne(block.mlp.experts, act).remove)
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
