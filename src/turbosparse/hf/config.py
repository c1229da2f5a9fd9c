"""What we read of a model's ``config.json``: one typed schema for every verb. Loads no torch.

Fields are named, and default, as in the configuration classes of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, Activation, stock
from turbosparse.hf.published import PUBLISHED, own_fields

# RoPE whose frequencies do not change with the length of the text
RopeType = Literal["default", "linear", "llama3", "yarn"]
# Far beyond any model: a damaged config.json must not ask for memory without end.
Count = Annotated[int, Field(ge=1, le=1000)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
Token = Annotated[int, Field(ge=-1, le=2**31 - 1)]  # older configs write -1 for none

_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# of the stock configuration classes
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
    },
    "llama": {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "mixtral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "arcee": {
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "nemotron": {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "num_key_value_heads": None,  # its class has no default either
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
_THETA = {"mixtral": 1e6}  # of the others 1e4


class Rope(BaseModel):
    """Rotary positions, of any kind whose frequencies are constant."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    rope_type: RopeType
    rope_theta: Positive
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None  # None: 1
    factor: Annotated[float, Field(ge=1)] | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        needed = [] if self.rope_type == "default" else ["factor"]
        if self.rope_type == "llama3":
            needed += ["low_freq_factor", "high_freq_factor"]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type {self.rope_type!r} needs {missing[0]}")
        if (self.low_freq_factor or 0) >= (self.high_freq_factor or float("inf")):
            raise ValueError("high_freq_factor must be more than low_freq_factor")
        return self


class ModelConfig(BaseModel):
    """The configuration of a model of a supported family, checked."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)
    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive | None = None
    norm_eps: Positive | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    ffn_activation: Activation | None = None
    ffn_threshold: Annotated[float, Field(ge=0)] | None = None
    rope_parameters: dict[str, Any]
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: Annotated[int, Field(ge=0)] | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        base = families.family(str(raw.get("model_type")))
        if base is None:
            raise ValueError(
                f"model_type {raw.get('model_type')!r} is not supported; supported are "
                + ", ".join((*families.MODEL_TYPES, *PUBLISHED))
            )
        quantised = raw.get("quantization_config") or raw.get("compression_config")
        if quantised:
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"the weights are quantised ({kind!s:.40}); use the model in 16 or 32 bits"
            )
        fields = _COMMON | _DEFAULTS[base] | raw
        fields |= _attention(base, fields)
        fields["rope_parameters"] = _rope(base, fields)
        for name in ("rms_norm_eps", "norm_eps", "num_local_experts", "num_experts_per_tok"):
            if name not in _DEFAULTS[base]:
                fields[name] = None
            elif fields[name] is None:
                raise ValueError(f"{name} is None")
        if str(raw["model_type"]).startswith(families.PREFIX):
            own = {"ffn_activation": "drelu", "ffn_threshold": 0.0, "hidden_act": "relu"}
            fields = own | fields
        return fields

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.mlp_bias:
            raise ValueError(
                "mlp_bias=true is not supported: a packed feed-forward has no room for biases"
            )
        if self.ffn_threshold and not ACTIVATIONS[self.ffn_activation or "swiglu"].cuts:
            raise ValueError(f"ffn_threshold is not for ffn_activation {self.ffn_activation!r}")
        turned = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1))
        if turned % 2 or not turned:
            raise ValueError(
                f"head_dim is {self.head_dim}, of which {turned} would be rotated: not an even "
                "number"
            )
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        used, experts = self.num_experts_per_tok or 0, self.num_local_experts or 0
        if families.experts(self) and used > experts:
            raise ValueError(f"num_experts_per_tok {used} is more than num_local_experts {experts}")
        return self

    @model_validator(mode="after")
    def _has_its_tokens(self) -> Self:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list) else [ids]:
                if (token or 0) >= self.vocab_size:
                    raise ValueError(f"{name} {token} is outside vocab_size {self.vocab_size}")
        return self

    @model_validator(mode="after")
    def _hidden_act_is_known(self) -> Self:
        ours = self.model_type.startswith(families.PREFIX)
        named = {record.hidden_act for record in ACTIVATIONS.values()}
        known = named if ours else stock(self.model_type)
        if self.hidden_act not in known:
            raise ValueError(
                f"hidden_act {self.hidden_act!r:.80} is not supported; "
                f"known are {', '.join(sorted(known))}"
            )
        return self

    @property
    def eps(self) -> float:
        """Of the norms: LayerNorm has another name for it than RMSNorm."""
        eps = self.rms_norm_eps or self.norm_eps
        assert eps
        return eps

    @property
    def context(self) -> int:
        """Positions that the model is made for: YaRN adds to those that it was trained on."""
        rope = self.rope_parameters
        if rope["rope_type"] != "yarn":
            return self.max_position_embeddings
        longer = int(rope["factor"] * rope["original_max_position_embeddings"])
        return max(self.max_position_embeddings, longer)


def _attention(base: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Heads and windows as the family's own code reads them."""
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    found: dict[str, Any] = {}
    known = _DEFAULTS[base].get("num_key_value_heads", heads) is not None
    if known and fields.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = heads
    if fields.get("head_dim") is None and type(heads) is type(fields["hidden_size"]) is int:
        found["head_dim"] = fields["hidden_size"] // max(heads, 1)
    windowed = "sliding_window" in _DEFAULTS[base]
    if not windowed or (base == "qwen2" and not fields.get("use_sliding_window")):
        found["sliding_window"] = None
    window = found.get("sliding_window", fields.get("sliding_window"))
    first = fields.get("max_window_layers")
    if base != "qwen2":
        found["layer_types"] = None
    elif fields.get("layer_types") is None and type(layers) is type(first) is int:
        slides = [window is not None and index >= first for index in range(min(layers, 1001))]
        found["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    return found


def _rope(base: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The parameters in today's form: older configs have ``rope_theta`` and ``rope_scaling``."""
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters is {given!r:.80}, not an object")
    rope = {"rope_theta": fields.get("rope_theta", _THETA.get(base, 1e4)), **given}
    rope.setdefault("rope_type", rope.get("type", "default"))
    if "partial_rotary_factor" in fields:
        rope.setdefault("partial_rotary_factor", fields["partial_rotary_factor"])
    part = rope.get("partial_rotary_factor")
    if "partial_rotary_factor" not in _DEFAULTS[base] and part not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {part!r:.80}: {base} rotates whole heads")
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    return Rope.model_validate(rope).model_dump(exclude_none=True)


def parse(raw: dict[str, Any], where: object) -> ModelConfig:
    """Check the JSON of a config; `where` is what messages call it.

    Raises:
        TurboSparseError: names the first field that is wrong.
    """
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise TurboSparseError(f"{where} is not valid: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{'.'.join(map(str, first['loc']))} is {first['input']!r:.80}: {message}"


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a supported model folder."""
    return parse(own_fields(folder), folder / "config.json")
