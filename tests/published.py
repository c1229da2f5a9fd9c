"""Tiny sparse models in the exact layouts in which others published theirs, and their formulas.

Names, keys and shapes are written out here, and the feed-forward is computed here, so that nothing
of what is tested stands on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HIDDEN, NEURONS, LAYERS, VOCABULARY, EXPERTS = 64, 96, 2, 320, 4
RANKS = (32, 64)  # of the predictors of a layer
TIES = 12  # the first rows of fc2 are zero, so the logits of these neurons are exactly 0
IM_END, IM_START = 290, 291  # behind the 290 tokens of the base

_SIZES = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def _remote(file: str, name: str) -> dict[str, Any]:
    """Keys that ask for the code beside the weights."""
    model = f"modeling_{file}.{name}ForCausalLM"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{file}.{name}Config",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
        },
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "bamboo": _SIZES
    | _remote("bamboo", "Bamboo")
    | {
        "attention_dropout": 0.0,
        "hidden_act": "relu",
        "model_type": "bamboo",
        "rope_theta": 10000.0,
        "sliding_window": 24,
        "transformers_version": "4.41.0",
        "use_cache": False,
    },
    "turbosparsemixtral": _SIZES
    | _remote("turbosparsemixtral", "TurboSparseMixtral")
    | {
        "hidden_act": "relu",
        "model_type": "turbosparsemixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
        "output_router_logits": True,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "use_cache": False,
    },
    "sparseqwen2": _SIZES
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "relu",
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
    },
    "prosparse": _SIZES
    | _remote("sparsellama", "SparseLlama")
    | {
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.25,
        "max_length": 128,
        "model_type": "sparsellama",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "use_cache": True,
    },
    "relullama": _SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "relu",
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
    "sparselm": _SIZES
    | {
        "architectures": ["SparseLlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "is_llama_config": True,
        "mlp_bias": False,
        "model_type": "llama_sparse_relu",
        "rope_interleaved": False,
        "rope_theta": 100000,
        "sparsity_gated_mlp": True,
        "sparsity_l1_coeff": 2e-05,
        "tie_word_embeddings": True,
    },
}
CONFIGS["minicpm"] = CONFIGS["prosparse"] | {
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoConfig": "LlamaConfig", "AutoModelForCausalLM": "LlamaForCausalLM"},
    "dim_model_base": 256,
    "model_type": "llama",
    "scale_depth": 1.4,
    "scale_emb": 12,
}
# what the command has to be told
ACTIVATION = {"sparseqwen2": "drelu", "relullama": "reglu"}
_DRELU = ("bamboo", "turbosparsemixtral", "sparseqwen2")
# of the transformers class that has the same attention, and where the predictor reads
BASE = dict.fromkeys(CONFIGS, "llama") | {
    "bamboo": "mistral",
    "turbosparsemixtral": "mixtral",
    "sparseqwen2": "qwen2",
}
READS = {"bamboo": "pre_norm", "turbosparsemixtral": "post_norm"}

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>system\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
)


def publish(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a model as it was published: shards of bf16, their index, tokenizer, remote code."""
    folder.mkdir(parents=True)
    config = CONFIGS[kind]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in {entry.split(".")[0] for entry in config.get("auto_map", {}).values()}:
        (folder / f"{file}.py").write_text("raise SystemExit('remote code was run')\n")
    settings = {"_from_model_config": True, "bos_token_id": 1, "do_sample": True}
    settings |= {"temperature": 0.0, "use_cache": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    _write_tokenizer(folder)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: _values(name, shape, random).bfloat16() for name, shape in _shapes(kind).items()
    }
    names = list(tensors)
    homes: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        homes |= dict.fromkeys(part, file)
    total = sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )
    return folder


def _shapes(kind: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer, rank in enumerate(RANKS):
        at = f"model.layers.{layer}."
        for part, rows in {"q": 64, "k": 32, "v": 32, "o": 64}.items():
            shapes[f"{at}self_attn.{part}_proj.weight"] = (rows, HIDDEN)
            if kind == "sparseqwen2" and part != "o":
                shapes[f"{at}self_attn.{part}_proj.bias"] = (rows,)
        if kind == "turbosparsemixtral":
            shapes[f"{at}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for gate, up, down, fc1, fc2 in ffns(kind, layer):
            shapes |= {gate: (NEURONS, HIDDEN), up: (NEURONS, HIDDEN), down: (HIDDEN, NEURONS)}
            if kind in READS:
                shapes |= {fc1: (rank, HIDDEN), fc2: (NEURONS, rank)}
        shapes[f"{at}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if kind != "sparselm":
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def ffns(kind: str, layer: int) -> list[list[str]]:
    """Names of gate, up, down, fc1 and fc2 of each feed-forward of a layer."""
    at = f"model.layers.{layer}."
    prefixes, parts = [f"{at}mlp."], ["gate_proj", "up_proj", "down_proj"]
    if kind == "turbosparsemixtral":
        prefixes = [f"{at}block_sparse_moe.experts.{expert}." for expert in range(EXPERTS)]
        parts = ["w1", "w3", "w2"]
    parts = [*parts, "predictor.fc1", "predictor.fc2"]
    return [[f"{prefix}{part}.weight" for part in parts] for prefix in prefixes]


def _values(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Norms far from 1, because a predictor sees through a mere factor; attention is quiet."""
    values = torch.randn(shape, generator=random)
    if "norm" in name:
        return 1 + 0.5 * values
    if name.endswith("fc2.weight"):
        values[:TIES] = 0
    if name.endswith("embed_tokens.weight"):
        return 0.3 * values
    return values * (0.05 if "o_proj" in name else 0.15)


def _write_tokenizer(folder: Path) -> None:
    """In the form of Llama's: pieces with bytes to fall back on, and ChatML's two tokens behind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", *".,\n", "th"]
    fast = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("t", "h")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    assert fast.get_vocab_size() == IM_END
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "chat_template": CHATML,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- the published formulas -----------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: tensor.float() for name, tensor in load_file(path).items()}
    return found


class FFN(nn.Module):
    """One published feed-forward; `mask` says how logits become candidates, None: all are."""

    def __init__(self, kind: str, weights: list[Tensor], mask: Any) -> None:
        super().__init__()
        self.kind, self.weights, self.mask = kind, weights, mask

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        gate, up, down, *predictor = self.weights
        g, u = x @ gate.T, x @ up.T
        at = CONFIGS[self.kind].get("hidden_act_param", 0.0)
        active = torch.where(g > at, g, 0.0) * (u.relu() if self.kind in _DRELU else u)
        if self.mask:
            fc1, fc2 = predictor
            active = active * self.mask((read @ fc1.T).relu() @ fc2.T)
        return active @ down.T


def rounded(logits: Tensor) -> Tensor:
    """The mask of the published modelling files: half rounds to even, so a tie is out."""
    return torch.sigmoid(logits).round()


class Block(nn.Module):
    """What stands in the place of a layer's MLP."""

    def __init__(self, ffns: list[FFN], router: Tensor | None, reads: str) -> None:
        super().__init__()
        self.ffns, self.router, self.reads = nn.ModuleList(ffns), router, reads
        self.before: Tensor  # the residual, as a hook on the norm saw it

    def forward(self, x: Tensor) -> Tensor:
        read = self.before if self.reads == "pre_norm" else x
        if self.router is None:
            return self.ffns[0](x, read)
        shares, chosen = (x @ self.router.T).softmax(-1).topk(2)
        shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert, ffn in enumerate(self.ffns):
            out += ffn(x, read) * (shares * (chosen == expert)).sum(-1, keepdim=True)
        return out


def formula(
    kind: str, tensors: dict[str, Tensor], mask: Any = None, *, reads: str | None = None
) -> Any:
    """The stock attention of transformers with the published feed-forward, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = CONFIGS[kind] | {"torch_dtype": "float32", "hidden_act": "relu"}
    fields |= {"output_router_logits": False}
    fields = {key: value for key, value in fields.items() if key not in ("auto_map", "model_type")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(BASE[kind], **fields))
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}, strict=False
    )
    model.tie_weights()
    for index, layer in enumerate(model.model.layers):
        parts = [
            FFN(kind, [tensors[name] for name in names if name in tensors], mask)
            for names in ffns(kind, index)
        ]
        router = tensors.get(f"model.layers.{index}.block_sparse_moe.gate.weight")
        layer.mlp = Block(parts, router, reads or READS.get(kind, "post_norm"))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs, block=layer.mlp: setattr(block, "before", inputs[0])
        )
    return model.eval()
