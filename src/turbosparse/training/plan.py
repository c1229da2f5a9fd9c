"""`train --plan`: what a run will need, from the recipe and the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.count import count_parameters
from turbosparse.hf.hub import model_folder
from turbosparse.training.recipe import Recipe, micro_batch

FLOPS_RULE = (
    "6 FLOPs per active parameter and token; active = every weight outside the FFN (of the input "
    "embedding one row) + the FFN or the experts in use, all neurons; attention scores not counted"
    "; 2 for those of a teacher"
)
MEMORY_RULE = (
    "weights, gradients and Adam's two moments are float32; activations are an estimate for the "
    "library's layers with fused attention; add 1-3 GiB for the CUDA context and fragmentation, on "
    "a CPU 0.5 GiB for Python and its libraries and a tenth for the allocator"
)
_FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """What a training run takes; memory in bytes for each process."""

    model_type: str
    activation: str
    parameters: int
    trained_parameters: int
    active_parameters: int
    processes: int
    shard: str
    precision: str
    gradient_checkpointing: bool
    micro_batch_size: int
    passes_per_step: int
    tokens_per_step: int
    steps: int
    tokens: int
    weights: int
    gradients: int
    optimiser: int
    working_copies: int
    teacher: int
    offloaded: int
    activations_whole: int
    activations_checkpointed: int
    total: int
    flops: float
    flops_rule: str
    memory_rule: str
    tflops: float | None
    seconds: float | None

    def __str__(self) -> str:
        states = self.weights + self.gradients + self.optimiser + self.working_copies
        states += self.teacher - self.offloaded
        in_host = f" + {_gib(self.offloaded).strip()} of host memory" if self.offloaded else ""
        chosen = "with" if self.gradient_checkpointing else "without"
        lines = [
            f"{self.model_type}, {self.activation}: {_short(self.parameters)} parameters, "
            f"{_short(self.active_parameters)} active, {_short(self.trained_parameters)} trained",
            f"{self.steps} steps of {self.tokens_per_step} tokens = {_short(self.tokens)} tokens; "
            f"a step is {self.processes} processes × {self.passes_per_step} passes × "
            f"{self.micro_batch_size} sequences",
            f"memory of a process (shard: {self.shard}, {self.precision}):",
            f"  weights        {_gib(self.weights)}",
            f"  gradients      {_gib(self.gradients)}",
            f"  Adam           {_gib(self.optimiser)}",
            f"  working copies {_gib(self.working_copies)}",
            *([f"  teacher        {_gib(self.teacher)}"] if self.teacher else []),
            f"  activations    {_gib(self.activations_whole)}, sum "
            f"{_gib(states + self.activations_whole)} without gradient checkpointing",
            f"                 {_gib(self.activations_checkpointed)}, sum "
            f"{_gib(states + self.activations_checkpointed)} with it",
            f"  as the recipe has it ({chosen}): {_gib(self.total).strip()}{in_host}",
            f"{self.flops:.3g} FLOPs",
        ]
        if self.seconds is not None:
            lines[-1] += (
                f"; at {self.tflops:g} TFLOP/s for each process {self.seconds / 3600:.1f} hours"
                + (", layers computed twice included" if self.gradient_checkpointing else "")
            )
        return "\n".join([*lines, f"({self.flops_rule})", f"({self.memory_rule})"])


def plan_training(recipe: Recipe, *, processes: int = 1, tflops: float | None = None) -> Plan:
    """Work out memory, steps and FLOPs of a run on `processes`.

    Args:
        tflops: what each process sustains, in 10¹² FLOP/s; for the time.
    """
    from turbosparse.base.machine import uses_bf16
    from turbosparse.hf.load import activation_of

    if recipe.deepspeed is not None:
        raise TurboSparseError(
            "--plan does not know what DeepSpeed takes; give shard: full instead of deepspeed, "
            "which cuts as ZeRO stage 3 does"
        )
    config = _config(recipe.model, recipe.activation)
    micro, _ = micro_batch(recipe, processes)
    compute = 2 if uses_bf16(recipe.precision) else _FLOAT
    parts = processes if recipe.shard == "full" else 1
    parameters = count_parameters(config)
    trained = _adapter_parameters(config, recipe) if recipe.lora else parameters.total
    state = -(-_FLOAT * trained // parts)
    memory = {
        "weights": -(-_FLOAT * parameters.total // parts) + (state if recipe.lora else 0),
        "gradients": state,
        "optimiser": 2 * state,
        "working_copies": _working_copies(config, recipe, processes, compute, trained),
    }
    teacher = count_parameters(_config(recipe.teacher.model)) if recipe.teacher else None
    memory["teacher"] = compute * teacher.total if teacher else 0
    tokens = micro * recipe.data.sequence_length
    # in bf16 the gradient of the logits takes the room of their copy in float32
    gradient = tokens * config.vocab_size * _FLOAT if compute == _FLOAT else 0
    whole, checkpointed = activation_bytes(
        config,
        tokens=tokens,
        compute=compute,
        stream=compute if recipe.shard == "full" else _FLOAT,
    )
    activations = (whole + gradient, checkpointed + gradient)
    offloaded = memory["weights"] + memory["gradients"] + memory["optimiser"]
    offloaded = offloaded if recipe.offload else 0
    tokens_per_step = recipe.batch_size * recipe.data.sequence_length
    asked = 2.0 * teacher.activated * tokens_per_step * recipe.steps() if teacher else 0.0
    trained_on = 6.0 * parameters.activated * tokens_per_step * recipe.steps()
    run = asked + trained_on * (8 / 6 if recipe.gradient_checkpointing else 1)
    return Plan(
        model_type=config.model_type,
        activation=activation_of(config),
        parameters=parameters.total,
        trained_parameters=trained,
        active_parameters=parameters.activated,
        processes=processes,
        shard=recipe.shard,
        precision="bf16" if compute == 2 else "fp32",
        gradient_checkpointing=recipe.gradient_checkpointing,
        micro_batch_size=micro,
        passes_per_step=recipe.batch_size // (micro * processes),
        tokens_per_step=tokens_per_step,
        steps=recipe.steps(),
        tokens=tokens_per_step * recipe.steps(),
        **memory,
        offloaded=offloaded,
        activations_whole=activations[0],
        activations_checkpointed=activations[1],
        total=sum(memory.values()) - offloaded + activations[recipe.gradient_checkpointing],
        flops=asked + trained_on,
        flops_rule=FLOPS_RULE,
        memory_rule=MEMORY_RULE,
        tflops=tflops,
        seconds=run / (tflops * 1e12 * processes) if tflops else None,
    )


def activation_bytes(config: Any, *, tokens: int, compute: int, stream: int) -> tuple[int, int]:
    """What the backward pass finds in memory, without and with gradient checkpointing.

    Args:
        compute: bytes of a number that matrices are multiplied in.
        stream: bytes of a number of the residual stream.
    """
    hidden, neurons = config.hidden_size, config.intermediate_size
    head = families.config_head_dim(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    # Each norm: its input in float32, what its weight multiplies, what the projections read.
    norm = (_FLOAT + stream + compute) * hidden
    attention = compute * (3 * queries + 2 * keys)
    # Of a neuron: relu(gate), relu(up), Combined; silu and gelu keep their input as well.
    kept = {"geglu": 4, "swiglu": 4, "relu": 1, "relu2": 2}.get(_activation(config), 3)
    used = config.num_experts_per_tok if families.experts(config) else 1
    ffn = used * compute * (kept * neurons + (2 * hidden if families.experts(config) else 0))
    layer = 2 * norm + attention + ffn
    # logits, in float32 too, their log-softmax
    logits = _FLOAT if compute == _FLOAT else compute + _FLOAT
    head_out = config.vocab_size * (logits + _FLOAT) + norm
    layers = config.num_hidden_layers
    whole = tokens * (layers * layer + head_out)
    return whole, tokens * (layers * stream * hidden + layer + head_out)


def _activation(config: Any) -> str:
    from turbosparse.hf.load import activation_of

    return activation_of(config)


def _working_copies(config: Any, recipe: Recipe, processes: int, compute: int, trained: int) -> int:
    """Weights in the type of the products, gradients on their way to other processes."""
    sizes = {tensor.role: prod(tensor.shape) for tensor in families.tensors(config)}
    total = sum(map(prod, families.tensor_shapes(config).values()))
    if recipe.shard == "full":
        ends = sizes["embedding"] + sizes.get("head", 0)
        layer = (total - ends) // int(config.num_hidden_layers)
        # two layers gathered, the gradient of one in both types
        return compute * (2 * layer + ends) + (compute + _FLOAT) * layer
    cast = compute * total if compute < _FLOAT else 0
    return cast + (_FLOAT * trained if processes > 1 else 0)


def _adapter_parameters(config: Any, recipe: Recipe) -> int:
    """Of LoRA: rank × (in + out) for each matrix that it stands beside."""
    assert recipe.lora
    return sum(
        recipe.lora.rank * sum(shape)
        for name, shape in families.tensor_shapes(config).items()
        if name.endswith(".weight") and name.split(".")[-2] in recipe.lora.targets
    )


def _config(model: str | dict[str, Any], activation: str | None = None) -> Any:
    from turbosparse.hf.load import load_config, new_config

    if not isinstance(model, str):
        return new_config(model, activation=activation)
    return load_config(model_folder(model, weights=False), activation)


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB"
