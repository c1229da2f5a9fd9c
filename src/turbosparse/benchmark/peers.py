"""Other engines to measure against, each on a model of the same shape."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import note
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.config import ModelConfig
from turbosparse.hf.gguf import gguf_table
from turbosparse.hf.gguf_writer import write_gguf
from turbosparse.packed.format import Packed

# of equal bytes; llama.cpp's fastest 4-bit kernels are those of Q4_0
_KINDS = {"f16": "F16", "q8": "Q8_0", "q4": "Q4_0", "q4_0": "Q4_0"}


PROCESS = [sys.executable, "-m", "turbosparse.benchmark.llama_cpp_process"]
BATCH = 512  # tokens of a prompt at a time
CONTEXT = 4096


class PeerDied(TurboSparseError):
    """A peer's process ended; the message is one line."""


class Peer:
    """An engine in a process of its own, so that its end is not ours.

    It answers `[prompt, decode]` with the seconds that each took, a JSON list a line; first it says
    that it is ready.

    Raises:
        PeerDied: the process ended, in a measurement.
    """

    name: str

    def __init__(self, command: list[str], prompt: int):
        self.prompt, self._command = prompt, command
        self._process: subprocess.Popen[str] | None = None  # until the first measurement

    def decode(self, tokens: int) -> float:
        """Tokens/s of one sequence."""
        return tokens / self._timed(self.prompt, tokens)[1]

    def prefill(self, tokens: int) -> float:
        return tokens / self._timed(tokens, 0)[0]

    @property
    def process(self) -> int | None:
        """The number of its process, which begins with the first measurement."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def _timed(self, prompt: int, decode: int) -> list[float]:
        """Seconds of reading a prompt and of decoding behind it."""
        try:
            if self._process is None:
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(
                    self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True
                )
                self._answer("opening the model")
            with suppress(BrokenPipeError):  # the answer says why
                print(json.dumps([prompt, decode]), file=self._process.stdin, flush=True)
            return list(self._answer(f"a prompt of {prompt} tokens and {decode} more"))
        except PeerDied:
            self._process = None
            raise

    def _answer(self, what: str) -> Any:
        assert self._process
        line = self._process.stdout and self._process.stdout.readline()
        if line:
            return json.loads(line)
        _, said = self._process.communicate()
        code = self._process.returncode
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        how = signal.Signals(-code).name if code < 0 else last
        raise PeerDied(f"{self.name} died in {what}: {how}")


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python.

    Its builds for some processors die of batches: then prompts go token by token.
    """

    name = "llama.cpp"

    def __init__(
        self, path: Path, *, threads: int, prompt: int, context: int = CONTEXT, stride: int = 0
    ):
        """With a `stride` every so many-th token is taken, one after the other, not at random."""
        how = path, threads, context, stride, BATCH
        super().__init__([*PROCESS, *map(str, how)], prompt)

    @classmethod
    @contextmanager
    def like(cls, packed: Packed, *, threads: int, prompt: int) -> Iterator[LlamaCpp]:
        """The peer on the dense model of a packed model's shape and quantisation."""
        if importlib.util.find_spec("llama_cpp") is None:
            raise TurboSparseError(
                "the peer llama.cpp needs llama-cpp-python: "
                "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.gguf"
            write_random_gguf(path, packed.config, packed.header.quant.gate)
            with closing(cls(path, threads=threads, prompt=prompt)) as peer:
                yield peer

    def _timed(self, prompt: int, decode: int) -> list[float]:
        try:
            return super()._timed(prompt, decode)
        except PeerDied as died:
            if self._command[-1] == "1":
                raise
            note(f"{died}; its prompts go token by token from here on")
            self._command[-1] = "1"
            return super()._timed(prompt, decode)


class OpenVINO(Peer):
    """OpenVINO's plugin for processors."""

    name = "openvino"

    @classmethod
    @contextmanager
    def like(cls, packed: Packed, *, threads: int, prompt: int) -> Iterator[OpenVINO]:
        """The peer on a dense Llama of a packed model's shape, in int4 in blocks of 32."""
        config, quant = packed.config, packed.header.quant.gate
        if (
            families.experts(config)
            or quant not in ("q4", "q4_0")
            or not ACTIVATIONS[packed.activation].gated
        ):
            raise TurboSparseError(
                f"the peer openvino is measured on gated dense models in q4 or q4_0; this one has "
                f"{families.experts(config)} experts and {packed.activation} in {quant}"
            )
        if importlib.util.find_spec("openvino") is None:
            raise TurboSparseError("the peer openvino needs it: pip install openvino")
        sizes = {
            "hidden": config.hidden_size,
            "neurons": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head": families.config_head_dim(config),
            "vocab": config.vocab_size,
        }
        module = "turbosparse.benchmark.openvino_process"
        command = [sys.executable, "-m", module, json.dumps(sizes), str(threads)]
        with closing(cls(command, prompt)) as peer:
            yield peer


PEERS = {peer.name: peer for peer in (LlamaCpp, OpenVINO)}


def write_random_gguf(path: Path, config: ModelConfig, quant: str, *, walks: bool = False) -> None:
    """Write a dense GGUF model with random weights in the shape of `config`, streaming to disk.

    What layers add to the hidden state is small, so that experts follow the token, as in
    `packed.synthetic`. With `walks` tokens that are near by number are alike there too.
    """
    kind = _KINDS[quant]
    tensors = list(gguf_table(config, biases=False).tensors(config))
    data = _random_tensors(tensors, quant, walks=walks)
    base = str(families.family(config.model_type))
    arch = "llama" if base in families.GATED else base
    write_gguf(path, arch, config, kind, tensors, data, lambda w: w.add_tokenizer_model("no_vocab"))


def _random_tensors(
    tensors: list[families.Tensor], quant: str, *, walks: bool
) -> Iterator[NDArray[Any]]:
    from turbosparse.packed.synthetic import QUIET, walk  # loads torch

    random = np.random.default_rng(0)
    for tensor in tensors:
        if tensor.row.packed != "float":
            factor = QUIET if tensor.role in ("o", "down") else 1.0
            rows = _random_blocks(random, tensor.shape, quant, 0.02 * factor)
            if walks and tensor.role == "embedding":
                walk(random, rows.view("<u2") if quant == "f16" else rows)
            yield rows
        elif tensor.role == "router":
            yield random.standard_normal(tensor.shape, dtype=np.float32)
        else:
            yield np.ones(tensor.shape, np.float32)


def _random_blocks(
    random: np.random.Generator, shape: tuple[int, ...], quant: str, deviation: float
) -> Any:
    """Random weights of this deviation and mean 0 in GGUF blocks, ``[..., row bytes]`` uint8."""
    *lead, cols = shape
    if quant == "f16":
        values = random.standard_normal(shape, dtype=np.float32) * deviation
        return values.astype(np.float16).view(np.uint8)
    size = 34 if quant == "q8" else 18  # bytes of a block: its scale, then 32 weights
    blocks = random.integers(0, 256, (*lead, cols // 32, size), dtype=np.uint8)
    if quant == "q8":
        blocks[blocks == 128] = 0  # -128, which has no opposite
        scale = np.float16(deviation / 73.3)
    else:  # nibbles 1 to 15 are -7 to 7; 0, which is -8, becomes 8, which is 0
        blocks |= np.where(blocks & 15, 0, 8).astype(np.uint8)
        blocks |= np.where(blocks >> 4, 0, 128).astype(np.uint8)
        scale = np.float16(deviation / 4.18)
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(*lead, -1)
