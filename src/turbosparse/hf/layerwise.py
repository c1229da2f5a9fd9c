"""Run a model one decoder layer at a time: only that layer's weights are in memory.

Shapes: N sequences, T tokens each, H hidden. What passes from layer to layer is ``[N, T, H]``.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Parameter
from torch.nn.functional import embedding, linear

from turbosparse.base.machine import Device, device_to_use, uses_bf16
from turbosparse.hf import families
from turbosparse.hf.checkpoint import Checkpoint
from turbosparse.hf.load import load_config, with_activation

CHUNK_TOKENS = 4096  # that go through a layer together


class _Nothing(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Layerwise:
    """The layers of a checkpoint, each loaded when it is asked for.

    Args:
        folder: model folder.
        activation: run the weights with this FFN activation instead of the folder's own.
        device: that the layers run on; ``auto`` takes a GPU if there is one.
        dtype: of weights and hidden states; by default bfloat16 if the checkpoint holds halves and
            the processor computes with them, else float32.
    """

    def __init__(
        self,
        folder: Path,
        *,
        activation: str | None = None,
        device: Device = "auto",
        dtype: torch.dtype | None = None,
    ):
        self.config = load_config(folder, activation)
        self.checkpoint = Checkpoint(folder)
        self.checkpoint.check(self.config)
        self.device = torch.device(device_to_use(device))
        self._table = families.table(self.config)
        self.dtype = dtype or self._usual_dtype()

    def _usual_dtype(self) -> torch.dtype:
        stored = self.checkpoint[self._table.name("norm")].dtype
        halves = stored != torch.float32 and uses_bf16("auto")
        return torch.bfloat16 if halves else torch.float32

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states before the first layer, of token ids ``[N, T]``; on the CPU."""
        return embedding(ids, self.checkpoint[self._table.name("embedding")]).to(self.dtype)

    def layer(self, index: int) -> Any:
        """A model of this one layer, with its weights, for `run`."""
        shell = self._shell(index)
        shell.layers[0].load_state_dict(self._weights(index), strict=True, assign=True)
        return shell.eval().requires_grad_(False)

    def empty_ffn(self, index: int, activation: str, threshold: float) -> Any:
        """The feed-forward of a layer with another activation, without weights."""
        config = with_activation(self.config, activation, threshold)
        return self._shell(index, config).layers[0].mlp

    def run(self, shell: Any, hidden: Tensor) -> Tensor:
        """Put the states of some sequences through the layer of `shell`."""
        states = shell(inputs_embeds=hidden.to(self.device), use_cache=False)
        after: Tensor = states.last_hidden_state.to(hidden.device)
        return after

    def attend(self, shell: Any, hidden: Tensor) -> None:
        """Move states ``[N, T, H]`` past the attention of a layer: they become its residual."""
        layer = shell.layers[0]
        mlp, layer.mlp = layer.mlp, _Nothing()
        for part in self.chunks(hidden):
            part.copy_(self.run(shell, part))
        layer.mlp = mlp

    def ffn_input(self, shell: Any, residual: Tensor) -> Tensor:
        """What the feed-forward of a layer reads of its residual ``[..., H]``."""
        x: Tensor = shell.layers[0].post_attention_layernorm(residual.to(self.device))
        return x

    def feed_forward(self, shell: Any, residual: Tensor) -> None:
        """Move a residual ``[N, T, H]`` past the feed-forward of a layer."""
        for part in self.chunks(residual):
            part.add_(shell.layers[0].mlp(self.ffn_input(shell, part)).to(part.device))

    def routed(self, shell: Any, residual: Tensor) -> Tensor:
        """The experts that each token goes to, ``[N, T, k]``."""
        router = shell.layers[0].mlp.gate
        found = [
            router(self.ffn_input(shell, part).flatten(0, 1))[2].cpu()
            for part in self.chunks(residual)
        ]
        return torch.cat(found).reshape(*residual.shape[:2], -1)

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        normed: Tensor = self._norm(hidden)
        return normed

    @cached_property
    def _norm(self) -> Any:
        norm = self._shell(0).layers[0].post_attention_layernorm  # of the same kind
        for part, _ in list(norm.named_parameters()):
            name = self._table.name("norm").replace("weight", part)
            setattr(norm, part, Parameter(self.checkpoint[name].to(self.dtype)))
        return norm

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of normed states ``[..., H]``."""
        return linear(hidden, self._head)

    @cached_property
    def _head(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        return self.checkpoint[self._table.name("embedding" if tied else "head")].to(self.dtype)

    def chunks(self, hidden: Tensor) -> list[Tensor]:
        """Views of some sequences each."""
        return list(hidden.split(max(1, CHUNK_TOKENS // hidden.shape[1])))

    def _shell(self, index: int, config: Any = None) -> Any:
        """A model of the layer `index` alone, without weights."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(config or self.config)
        config.num_hidden_layers = 1
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = [kinds[index]]
        with torch.device("meta"):
            shell: Any = AutoModelForCausalLM.from_config(config, dtype=self.dtype).model
        shell.embed_tokens, shell.norm = Identity(), Identity()
        shell.rotary_emb = type(shell.rotary_emb)(config).to(self.device)
        return shell

    def _weights(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer by the names of its module; the experts' are fused."""
        prefix = f"model.layers.{index}."

        def get(name: str) -> Tensor:
            return self.checkpoint[name].to(self.device, self.dtype)

        experts = range(families.experts(self.config))
        inside = families.layer_tensors(self.config, index)
        found = {
            tensor.name.removeprefix(prefix): get(tensor.name)
            for role, tensor in inside.items()
            if role != "router"
        }
        if experts:
            name = self._table.name
            found["mlp.gate.weight"] = get(name("router", index))
            found["mlp.experts.gate_up_proj"] = torch.stack(
                [torch.cat([get(name(r, index, e)) for r in ("gate", "up")]) for e in experts]
            )
            found["mlp.experts.down_proj"] = torch.stack(
                [get(name("down", index, e)) for e in experts]
            )
        return found
