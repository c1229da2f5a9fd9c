"""Other engines to measure against, each in the same process and on a model of the same shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.config import ModelConfig
from turbosparse.hf.gguf import gguf_table
from turbosparse.hf.gguf_writer import write_gguf
from turbosparse.packed.format import Packed

# of equal bytes; llama.cpp's fastest 4-bit kernels are those of Q4_0
_KINDS = {"f16": "F16", "q8": "Q8_0", "q4": "Q4_0", "q4_0": "Q4_0"}


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a dense GGUF of random weights."""

    def __init__(self, path: Path, *, threads: int, prompt: int):
        import llama_cpp

        self.prompt = prompt
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=4096,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.random = np.random.default_rng(0)

    @classmethod
    @contextmanager
    def like(cls, packed: Packed, *, threads: int, prompt: int) -> Iterator[LlamaCpp]:
        """The peer on the dense model of a packed model's shape and quantisation."""
        try:
            import llama_cpp  # noqa: F401
        except ImportError as error:
            raise TurboSparseError(
                "the peer llama.cpp needs llama-cpp-python: "
                "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.gguf"
            write_random_gguf(path, packed.config, packed.header.quant.gate)
            yield cls(path, threads=threads, prompt=prompt)

    def _tokens(self, count: int) -> list[int]:
        return [int(t) for t in self.random.integers(0, self.llama.n_vocab(), count)]

    def decode(self, tokens: int) -> float:
        """Tokens/s of one sequence."""
        self.llama.reset()
        self.llama.eval(self._tokens(self.prompt))
        began = time.perf_counter()
        for token in self._tokens(tokens):
            self.llama.eval([token])
        return tokens / (time.perf_counter() - began)

    def prefill(self, tokens: int) -> float:
        self.llama.reset()
        began = time.perf_counter()
        self.llama.eval(self._tokens(tokens))
        return tokens / (time.perf_counter() - began)


def write_random_gguf(path: Path, config: ModelConfig, quant: str) -> None:
    """Write a dense GGUF model with random weights in the shape of `config`, streaming to disk."""
    kind = _KINDS[quant]
    tensors = list(gguf_table(config, biases=False).tensors(config))
    data = _random_tensors(tensors, quant)
    base = str(families.family(config.model_type))
    arch = "llama" if base in families.GATED else base
    write_gguf(path, arch, config, kind, tensors, data, lambda w: w.add_tokenizer_model("no_vocab"))


def _random_tensors(tensors: list[families.Tensor], quant: str) -> Iterator[NDArray[Any]]:
    random = np.random.default_rng(0)
    for tensor in tensors:
        if tensor.row.packed != "float":
            yield _random_blocks(random, tensor.shape, quant)
        elif tensor.role == "router":
            yield random.standard_normal(tensor.shape, dtype=np.float32)
        else:
            yield np.ones(tensor.shape, np.float32)


def _random_blocks(random: np.random.Generator, shape: tuple[int, ...], quant: str) -> Any:
    """Random weights of deviation 0.02 in GGUF blocks, ``[..., row bytes]`` uint8."""
    *lead, cols = shape
    if quant == "f16":
        return (
            (random.standard_normal(shape, dtype=np.float32) * 0.02)
            .astype(np.float16)
            .view(np.uint8)
        )
    size = 34 if quant == "q8" else 18  # bytes of a block: its scale, then 32 weights
    blocks = random.integers(0, 256, (*lead, cols // 32, size), dtype=np.uint8)
    scale = np.float16(0.02 / (73.6 if quant == "q8" else 4.6))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(*lead, -1)
