"""Watch the Combined vectors of a running model, dense or MoE, stock or ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from turbosparse.hf.activations import ACTIVATIONS
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
                watch = OneByOne(mlp.experts, act) if apart else _watch_experts(mlp.experts, act)
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


class OneByOne:
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
