"""The tensors of a checkpoint on disk, one row each. Loads no torch.

A family is a table of rows. A foreign dialect, which has other names for the same weights, is a
table made with `Table.renamed`. Shapes are ``[out, in]`` as in ``nn.Linear``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

PREFIX = "drelu_"  # of the model_type of our classes
When = Literal["always", "untied", "biased", "predictor"]


class Row(NamedTuple):
    """A kind of tensor.

    `shape` is in the symbols of `sizes`. `packed` says how it stands in a packed folder: quantised
    rows, float32 as it is, a third of a feed-forward's rows, or a matrix of its predictor. `when`
    is the condition (`_applies`) under which a checkpoint holds it.
    """

    role: str
    pattern: str  # with {layer} and {expert}
    shape: str
    packed: Literal["matrix", "float", "ffn", "predictor"] = "matrix"
    when: When = "always"


class Tensor(NamedTuple):
    """One tensor of a model: its row, its place and its shape (0 for a predictor's own rank)."""

    name: str
    row: Row
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]

    @property
    def role(self) -> str:
        return self.row.role


class Table(NamedTuple):
    """The tensors of a family, in the order in which a decoder reads them."""

    rows: tuple[Row, ...]

    def row(self, role: str) -> Row | None:
        return next((row for row in self.rows if row.role == role), None)

    def name(self, role: str, layer: int | None = None, expert: int | None = None) -> str:
        """Of the tensor with this role; KeyError if the family has no such role."""
        row = self.row(role)
        if row is None:
            raise KeyError(role)
        return row.pattern.format(layer=layer, expert=expert)

    def find(self, name: str) -> tuple[Row, int | None, int | None] | None:
        """The row, layer and expert of a tensor's name; None if the table does not have it."""
        for row in self.rows:
            if found := _regex(row.pattern).fullmatch(name):
                place = found.groupdict()
                layer, expert = (
                    int(place[key]) if key in place else None for key in ("layer", "expert")
                )
                return row, layer, expert
        return None

    def renamed(self, patterns: dict[str, str]) -> Table:
        """The rows with these roles under other names: a dialect.

        A pattern without ``{expert}`` stacks the experts of a layer in one tensor.
        """
        kept = [row for row in self.rows if row.role in patterns]
        return Table(tuple(_renamed(row, patterns[row.role]) for row in kept))

    def tensors(self, config: Any, layers: Iterable[int] | None = None) -> Iterator[Tensor]:
        """Every tensor that a checkpoint of this config holds, but for a predictor's.

        Args:
            config: of the model.
            layers: only those inside these layers.
        """
        known = sizes(config)
        rows = [row for row in self.rows if _applies(row, config)]
        inside = [row for row in rows if "{layer}" in row.pattern]
        first = rows.index(inside[0])
        for row in rows[:first] if layers is None else ():
            yield _tensor(row, known, None, None)
        for layer in range(config.num_hidden_layers) if layers is None else layers:
            for row in inside:
                if "{expert}" not in row.pattern:
                    yield _tensor(row, known, layer, None)
            for expert in range(known["E"]):
                for row in inside:
                    if "{expert}" in row.pattern:
                        yield _tensor(row, known, layer, expert)
        for row in rows[first + len(inside) :] if layers is None else ():
            yield _tensor(row, known, None, None)


def _tensor(row: Row, known: dict[str, int], layer: int | None, expert: int | None) -> Tensor:
    name = row.pattern.format(layer=layer, expert=expert)
    return Tensor(name, row, layer, expert, tuple(known[symbol] for symbol in row.shape))


def _renamed(row: Row, pattern: str) -> Row:
    stacked = "{expert}" in row.pattern and "{expert}" not in pattern
    return row._replace(pattern=pattern, shape="E" * stacked + row.shape)


def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    for place in ("layer", "expert"):
        text = text.replace(rf"\{{{place}\}}", rf"(?P<{place}>0|[1-9]\d*)")
    return re.compile(text, re.ASCII)


def _applies(row: Row, config: Any) -> bool:
    if row.when == "untied":
        return not config.tie_word_embeddings
    if row.when == "biased":
        return bool(getattr(config, "attention_bias", False))
    return row.when == "always"


def sizes(config: Any) -> dict[str, int]:
    """What the symbols of a shape stand for."""
    head = config_head_dim(config)
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "Q": config.num_attention_heads * head,  # of all query heads
        "K": config.num_key_value_heads * head,
        "E": experts(config),
        "R": 0,  # rank of a predictor: its own in each feed-forward
    }


def config_head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rows(
    module: str,
    parts: dict[str, str],
    *,
    router: str = "",
    biases: str = "",
    when: When = "always",
    norms: tuple[str, ...] = ("weight",),
) -> Table:
    """The table of a family.

    Args:
        module: that holds a feed-forward, with its place.
        parts: names of up and down in it, and of the gate, if there is one.
        router: its name in a layer; "" for a dense family.
        biases: which of q, k, v and o have one.
        when: they do.
        norms: what one consists of. RMSNorm has a weight; LayerNorm1P has a bias as well, and its
            weight is less by one.
    """
    layer = "model.layers.{layer}."

    def norm(role: str, module: str) -> list[Row]:
        roles = {"weight": role, "bias": f"{role}.bias"}
        return [Row(roles[part], f"{module}.{part}", "H", "float") for part in norms]

    rows = [Row("embedding", "model.embed_tokens.weight", "VH")]
    rows += norm("attention_norm", f"{layer}input_layernorm")
    rows += norm("ffn_norm", f"{layer}post_attention_layernorm")
    for role, shape in {"q": "QH", "k": "KH", "v": "KH", "o": "HQ"}.items():
        projection = f"{layer}self_attn.{role}_proj."
        rows.append(Row(role, f"{projection}weight", shape))
        if role in biases:
            rows.append(Row(f"{role}.bias", f"{projection}bias", shape[0], "float", when))
    if router:
        rows.append(Row("router", f"{layer}{router}.weight", "EH", "float"))
    for role, part in parts.items():
        shape = "HI" if role == "down" else "IH"
        rows.append(Row(role, f"{layer}{module}{part}.weight", shape, "ffn"))
    for role, shape in {"fc1": "RH", "fc2": "IR"}.items():
        name = f"{layer}{module}predictor.{role}.weight"
        rows.append(Row(role, name, shape, "predictor", "predictor"))
    rows += norm("norm", "model.norm")
    rows.append(Row("head", "lm_head.weight", "VH", "matrix", "untied"))
    return Table(tuple(rows))


FFN_ROLES = ("gate", "up", "down")
ATTENTION_ROLES = tuple(f"{role}{kind}" for role in "qkvo" for kind in ("", ".bias"))
_UNGATED = ("mlp.", {"up": "up_proj", "down": "down_proj"})
_DENSE = ("mlp.", {"gate": "gate_proj", **_UNGATED[1]})
TABLES: dict[str, Table] = {
    "mistral": _rows(*_DENSE),
    "llama": _rows(*_DENSE, biases="qkvo", when="biased"),
    "qwen2": _rows(*_DENSE, biases="qkv"),
    "mixtral": _rows(
        "block_sparse_moe.experts.{expert}.",
        {"gate": "w1", "up": "w3", "down": "w2"},
        router="block_sparse_moe.gate",
    ),
    "arcee": _rows(*_UNGATED, biases="qkvo", when="biased"),
    "nemotron": _rows(*_UNGATED, biases="qkvo", when="biased", norms=("weight", "bias")),
}
FAMILIES = tuple(TABLES)
GATED = tuple(name for name, table in TABLES.items() if table.row("gate"))
MODEL_TYPES = (*FAMILIES, *(PREFIX + name for name in GATED))


def family(model_type: str) -> str | None:
    """The stock architecture behind a ``model_type``, or None if we do not support it."""
    return model_type.removeprefix(PREFIX) if model_type in MODEL_TYPES else None


def table(config: Any) -> Table:
    return TABLES[config.model_type.removeprefix(PREFIX)]


def experts(config: Any) -> int:
    """Number of experts of a layer; 0 for a dense model."""
    moe = "router" in {row.role for row in table(config).rows}
    return int(config.num_local_experts) if moe else 0


def ffns(config: Any) -> list[tuple[int, int | None]]:
    """Every (layer, expert) that holds an FFN; expert is None in a dense model."""
    slots: list[int | None] = list(range(experts(config))) or [None]
    return [(layer, expert) for layer in range(config.num_hidden_layers) for expert in slots]


def ffn(config: Any, layer: int, expert: int | None) -> dict[str, str]:
    """Names of gate, up and down by role; there may be no gate."""
    rows = [row for row in table(config).rows if row.packed == "ffn"]
    return {row.role: row.pattern.format(layer=layer, expert=expert) for row in rows}


def layer_tensors(config: Any, layer: int) -> dict[str, Tensor]:
    """The tensors of a layer by role, but for those of experts."""
    found = table(config).tensors(config, [layer])
    return {tensor.role: tensor for tensor in found if tensor.expert is None}


def tensors(config: Any) -> list[Tensor]:
    return list(table(config).tensors(config))


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold."""
    return {tensor.name: tensor.shape for tensor in tensors(config)}
