"""The feed-forward activations, one record each. Loads no torch.

Their formulas stand in `ffn_activation.combined`, which travels inside exported models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from turbosparse.hf import families

Activation = Literal["drelu", "geglu", "reglu", "relu", "relu2", "swiglu"]


class Record(NamedTuple):
    """What the rest of the program has to know about an activation."""

    formula: str
    parts: tuple[str, ...]  # the matrices that it reads; an ungated one takes up for its gate
    zero_by: tuple[str, ...]  # those of which each alone, where not positive, makes Combined zero
    hidden_act: str  # what config.json tells a reader who does not know ``ffn_activation``

    @property
    def gated(self) -> bool:
        return "gate" in self.parts

    @property
    def cuts(self) -> bool:
        """Whether a gate may be cut to zero above zero too, as FATReLU does."""
        return "gate" in self.zero_by


_THREE, _TWO = families.FFN_ROLES, families.FFN_ROLES[1:]
ACTIVATIONS: dict[str, Record] = {
    "drelu": Record("relu(gate) * relu(up)", _THREE, ("gate", "up"), "relu"),
    "geglu": Record("gelu(gate) * up", _THREE, (), "gelu"),
    "reglu": Record("relu(gate) * up", _THREE, ("gate",), "relu"),
    "relu": Record("relu(up)", _TWO, ("up",), "relu"),
    "relu2": Record("relu(up) ** 2", _TWO, ("up",), "relu2"),
    "swiglu": Record("silu(gate) * up", _THREE, (), "silu"),
}
assert tuple(ACTIVATIONS) == get_args(Activation)
WITHOUT_ZEROS = tuple(name for name, record in ACTIVATIONS.items() if not record.zero_by)
# what ``hidden_act`` says where the model is of a stock class, with a gate and without; relu beside
# a gate: published models mean reglu or drelu, and nothing in them tells which
_STOCK: dict[bool, dict[str, Activation | None]] = {
    True: {"silu": "swiglu", "swish": "swiglu", "relu": None},
    False: {"relu": "relu", "relu2": "relu2"},
}


def stock(family: str) -> dict[str, Activation | None]:
    """By ``hidden_act``, what the stock class of a family may mean; None: it does not say."""
    return _STOCK[family in families.GATED]
