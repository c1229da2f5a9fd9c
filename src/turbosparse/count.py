"""What one token costs: parameters, bytes and FLOPs by part, and the speed that they allow.

From a config and a sparsity, given or measured, for the ways to run the model: dense, exact (every
gate is read) and predicted (a predictor picks the neurons). The counting rule is part of the result
because published counts differ by theirs.

    turbosparse count mixtral-8x7b --sparsity 0.85 --rank 1036 --bandwidth 67
    turbosparse count mistral-q4
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import threads_to_use
from turbosparse.benchmark.harness import Memory
from turbosparse.engine.cost import kept_bytes
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS, Activation
from turbosparse.hf.checkpoint import Checkpoint, shard_names
from turbosparse.hf.config import ModelConfig, parse
from turbosparse.hf.count import RULE, Use, Weigh, count_parameters, experts_in_use, weights
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import activation_keys, activation_of
from turbosparse.hf.published import own_fields
from turbosparse.ops.cost import bytes_of, flops, needed
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import Quant
from turbosparse.packed.format import Packed, is_packed, same_matrices
from turbosparse.packed.header import Profile, QuantMap

ROUNDS = 5  # of measuring the bandwidth
Parts = dict[str, float]


@dataclass(frozen=True)
class Count:
    """What `count` found, for one token; modes are dense, exact, predicted and oracle.

    The oracle knows the active neurons and reads their rows only: Turbo Sparse's count.
    """

    model: str
    activation: str
    rule: str
    source: str  # of the shares, which are of the neurons in use
    candidates: float
    gate_positive: float
    active: float
    quant: str
    positions: int  # in the key-value cache
    total: int  # parameters of the model, without a predictor
    activated: dict[str, int]  # the oracle's, by what is included
    parameters: dict[str, Parts]  # by mode and part
    bytes: dict[str, Parts]
    flops: dict[str, Parts]
    bandwidth: float  # GB/s
    tokens_per_second: dict[str, float]  # that the bandwidth allows, by mode

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        modes, speeds = list(self.bytes), self.tokens_per_second
        parts = Table("million parameters", *modes, title=f"{self.model}: one token")
        for part in self.parameters["dense"]:
            if any(self.parameters[mode][part] for mode in modes):
                parts.add_row(part, *(f"{self.parameters[m][part] / 1e6:,.2f}" for m in modes))
        parts.add_section()
        rows = {"all": self.parameters, "MB": self.bytes, "MFLOP": self.flops}
        for name, table in rows.items():
            parts.add_row(name, *(f"{sum(table[m].values()) / 1e6:,.2f}" for m in modes))
        parts.add_row(
            f"tokens/s at {self.bandwidth:.1f} GB/s", *(f"{speeds[m]:,.2f}" for m in modes)
        )
        parts.add_row("× dense", *(f"{speeds[m] / speeds['dense']:.2f}" for m in modes))
        counts = Table("activated parameters", "", title=f"{self.total:,} parameters in all")
        for name, number in self.activated.items():
            counts.add_row(name, f"{number:,}")
        return Group(
            f"{self.activation}: {self.active:.2%} of the neurons in use are active, "
            f"{self.gate_positive:.2%} have a positive gate, {self.candidates:.2%} are candidates "
            f"({self.source}); {self.quant}, {self.positions} positions in the cache",
            parts,
            counts,
            f"rule: {self.rule}",
        )


class _Model(NamedTuple):
    """What there is to know of the model that is counted."""

    config: ModelConfig
    profile: Profile | None = None
    predictor: Predictor | None = None
    quants: QuantMap | None = None


def count(
    model: str,
    *,
    sparsity: float | None = None,
    gate_positive: float | None = None,
    candidates: float | None = None,
    rank: int | None = None,
    stats: AnyPath | None = None,
    activation: Activation | None = None,
    quant: Quant | None = None,
    positions: int = 0,
    bandwidth: float | None = None,
) -> Count:
    """Count what one token needs: parameters, bytes, FLOPs, and the speed that they allow.

    Parameters
    ----------
    model
        Packed folder, model folder, hub id (its config is enough), or a shape: mistral-7b,
        mixtral-8x7b, afm-4.5b, llama-1b or llama-15m.
    sparsity
        Share of inactive neurons, in the experts in use; by default the one that analyse measured.
        A model whose activation has no zeros is then counted as its dReLU model.
    gate_positive
        Share of neurons with positive gate; by default the measured one, or with --sparsity that of
        gates and ups which are independent and alike.
    candidates
        Share of neurons that the predictor lets through; by default the one that was measured when
        it was made, or that of a perfect one.
    rank
        Width of a predictor of two q8 matrices in every feed-forward, or their mean width, for a
        model that holds none.
    stats
        stats.turbosparse of analyse; by default the one in the model folder, if any.
    activation
        Count the weights with this feed-forward.
    quant
        By default that of the packed folder, else q4 (embedding and head q8).
    positions
        In the key-value cache.
    bandwidth
        GB/s of the memory; by default that of this machine is measured.
    """
    shares = sparsity, gate_positive, candidates
    _check(shares, rank, positions, bandwidth)
    found = _open(model, local_path(stats) if stats else None, activation, bool(sparsity))
    config, quants = found.config, found.quants
    predictor = _low_rank(config, rank) if rank else found.predictor
    use, source = _use(model, found, predictor, *shares)
    if quant or quants is None:
        quants = QuantMap.default(quant or "q4", {}, same=same_matrices(config))
    modes = ["dense"]
    if activation_of(config) not in WITHOUT_ZEROS:
        modes += ["exact", *(["predicted"] if predictor else []), "oracle"]

    def table(weigh: Weigh, cache: float) -> dict[str, Parts]:
        return {
            mode: needed(config, weigh, mode, _of_token(config, mode, use, predictor), predictor)
            | {"keys and values": cache}
            for mode in modes
        }

    parameters = table(weights, 0)
    sizes = table(bytes_of(dict(quants), predictor), positions * kept_bytes(config))
    attended = 4.0 * positions * families.sizes(config)["Q"] * config.num_hidden_layers
    speed = bandwidth or _bandwidth()
    return Count(
        model=model,
        activation=activation_of(config),
        rule=RULE,
        source=source,
        candidates=use.candidates,
        gate_positive=use.gate_positive,
        active=use.active,
        quant=str(quants),
        positions=positions,
        total=count_parameters(config).total,
        activated=_activated(config, parameters),
        parameters=parameters,
        bytes=sizes,
        flops=table(flops, attended),
        bandwidth=speed,
        tokens_per_second={mode: speed * 1e9 / sum(sizes[mode].values()) for mode in modes},
    )


def _check(
    shares: tuple[float | None, ...], rank: int | None, positions: int, bandwidth: float | None
) -> None:
    for name, share in zip(("sparsity", "gate-positive", "candidates"), shares, strict=True):
        if share is not None and not 0 <= share <= 1:
            raise TurboSparseError(f"--{name} {share:g} is a share: give 0 to 1")
    if positions < 0 or (rank is not None and rank < 1):
        raise TurboSparseError(f"--positions is {positions}, at least 0; --rank {rank}, at least 1")
    if bandwidth is not None and bandwidth <= 0:
        raise TurboSparseError(f"--bandwidth {bandwidth:g} must be more than 0 GB/s")


def _open(model: str, stats: Path | None, activation: Activation | None, sparse: bool) -> _Model:
    from turbosparse.packed.stats import Stats
    from turbosparse.packed.synthetic import SHAPES

    folder = None if model in SHAPES else model_folder(model, weights=False)
    packed = Packed(folder) if folder and is_packed(folder) else None
    if packed:
        config = packed.config
    else:
        raw = own_fields(folder) if folder else dict(SHAPES[model])
        config = _with(raw, folder / "config.json" if folder else model, activation, sparse)
    found = Stats.find(folder or Path(), stats) if folder or stats else None
    if found:
        found.check(config)
    profile = found.profile() if found else packed.header.profile if packed else None
    if packed:
        return _Model(config, profile, packed.header.ffn.predictor, packed.header.quant)
    return _Model(config, profile, _merged(folder, config) if folder else None)


def _with(
    raw: dict[str, Any], where: object, activation: Activation | None, sparse: bool
) -> ModelConfig:
    """The config with this activation; of a model without zeros that is to be sparse, dReLU."""
    config = parse(raw, where)
    if activation is None and sparse and activation_of(config) in WITHOUT_ZEROS:
        activation = "drelu"
    if activation is None:
        return config
    return parse(raw | activation_keys(config.model_type, activation), where)


def _merged(folder: Path, config: ModelConfig) -> Predictor | None:
    """The predictor that stands in a model folder, as `pack` would take it."""
    from turbosparse.predictors.mask import find_predictor

    there = all((folder / name).is_file() for name in shard_names(folder))  # not a config alone
    if not there or activation_of(config) in WITHOUT_ZEROS:
        return None
    return find_predictor(config, Checkpoint(folder), quant="q8")


def _low_rank(config: ModelConfig, rank: int) -> Predictor:
    ranks = [[rank] * max(1, families.experts(config))] * config.num_hidden_layers
    return Predictor(kind="low_rank", quant="q8", input="post_norm", threshold=0.0, ranks=ranks)


def _use(
    model: str,
    found: _Model,
    predictor: Predictor | None,
    sparsity: float | None,
    gate_positive: float | None,
    candidates: float | None,
) -> tuple[Use, str]:
    """Shares of the neurons in use, and where they are from."""
    zero_by, profile = ACTIVATIONS[activation_of(found.config)].zero_by, found.profile
    if not zero_by:
        return Use(1, 1, 1, 1), "it has no exact zeros"
    if sparsity is not None:
        active, source = 1 - sparsity, "given"
        gate = active ** (1 / len(zero_by))
    elif profile:
        active, gate = (
            statistics.fmean(profile.per_layer(ratios))
            for ratios in (profile.active, profile.gate_positive)
        )
        source = f"measured on {profile.tokens} tokens"
    else:
        raise TurboSparseError(
            f"the sparsity of {model} is not known: give --sparsity, or measure it with "
            "`turbosparse analyse`"
        )
    if candidates is None:
        density = predictor.density if predictor else None
        candidates = active if density is None else density
    return Use(1, candidates, gate if gate_positive is None else gate_positive, active), source


def _of_token(config: ModelConfig, mode: str, use: Use, predictor: Predictor | None) -> Use:
    """Shares of all neurons. Candidates in vain have a positive gate as often as any inactive."""
    gate, active = use.gate_positive, use.active
    if mode == "predicted" and predictor and use.active < 1:
        active *= 1 if predictor.recall is None else predictor.recall
        vain = max(0.0, use.candidates - active)
        gate = active + vain * (gate - use.active) / (1 - use.active)
    every = experts_in_use(config) / (families.experts(config) or 1)
    return Use(*(every * share for share in (1, use.candidates, gate, active)))


def _activated(config: ModelConfig, parameters: dict[str, Parts]) -> dict[str, int]:
    """The activated parameters by the rule, and by what published counts include or leave out."""
    parts = parameters.get("oracle", parameters["dense"])
    predictors = parameters.get("predicted", {}).get("predictors", 0)
    rule = sum(parts.values())
    table = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    found = {
        "by the rule": rule,
        "without embedding and LM head": rule - parts["embedding"] - parts["head"],
        "with the whole input embedding": rule + table,
        "with predictors": rule + predictors,
        "with the whole input embedding and predictors": rule + table + predictors,
    }
    return {name: round(number) for name, number in found.items()}


def _bandwidth() -> float:
    memory = Memory(threads_to_use(None))
    return statistics.median(memory.read_speed() for _ in range(ROUNDS))
