"""The feed-forward activations, one record each. Loads no torch.

Their formulas stand in `ffn_activation.combined`, which travels inside exported models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Activation = Literal["drelu", "geglu", "reglu", "relu", "swiglu"]


class Record(NamedTuple):
    """What the rest of the program has to know about an activation."""

    formula: str
    gated: bool  # whether it reads the gate
    exact_zeros: bool  # whether there is anything to skip
    hidden_act: str  # what config.json tells a reader who does not know ``ffn_activation``

    @property
    def cuts(self) -> bool:
        """Whether a gate may be cut to zero above zero too, as FATReLU does."""
        return self.gated and self.exact_zeros


ACTIVATIONS: dict[str, Record] = {
    "drelu": Record("relu(gate) * relu(up)", True, True, "relu"),
    "geglu": Record("gelu(gate) * up", True, False, "gelu"),
    "reglu": Record("relu(gate) * up", True, True, "relu"),
    "relu": Record("relu(up)", False, True, "relu"),
    "swiglu": Record("silu(gate) * up", True, False, "silu"),
}
assert tuple(ACTIVATIONS) == get_args(Activation)
# what ``hidden_act`` says where the model is of a stock class; relu: published models mean reglu or
# drelu, and nothing in them tells which
STOCK: dict[str, Activation | None] = {"silu": "swiglu", "swish": "swiglu", "relu": None}
WITHOUT_ZEROS = tuple(name for name, record in ACTIVATIONS.items() if not record.exact_zeros)
