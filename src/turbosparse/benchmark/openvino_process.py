"""OpenVINO in a process of its own, on a random dense Llama that it builds; see `peer_process`.

    python -m turbosparse.benchmark.openvino_process SIZES THREADS

SIZES is a JSON object. Weights are int4 in blocks of 32 with f16 scales, the embedding f16, in the
form that the plugin for processors reads packed. It fuses norms and attention by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.benchmark.peer_process import answer

BLOCK = 32


class Graph:
    """Of one sequence: tokens, their rotations and a mask in, logits of the last token out.

    Shapes: T new tokens, S of the sequence, D head.
    """

    def __init__(self, sizes: dict[str, int]):
        import openvino as ov
        from openvino import opset13 as op

        self.ov, self.op, self.sizes, self.head = ov, op, sizes, sizes["head"]
        self.random = np.random.default_rng(0)
        self.sinks: list[Any] = []
        self.arrays: list[Any] = []  # that the graph points into
        self.cos = op.parameter([1, 1, -1, self.head], np.float32)  # [T, D]
        self.sin = op.parameter([1, 1, -1, self.head], np.float32)
        self.mask = op.parameter([1, 1, -1, -1], np.float32)  # [T, S]
        self.beam = op.parameter([-1], np.int32)  # 0: attention is fused where it is there

    def model(self) -> Any:
        op, sizes = self.op, self.sizes
        ids = op.parameter([1, -1], np.int64)
        shape = sizes["vocab"], sizes["hidden"]
        table = (self.random.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16)
        x = op.gather(op.convert(op.constant(table), "f32"), ids, np.array(0))
        for index in range(sizes["layers"]):
            x = op.add(x, self.attention(self.norm(x), index))
            x = op.add(x, self.feed_forward(self.norm(x)))
        last = op.gather(self.norm(x), np.array([-1]), np.array(1))
        logits = op.result(self.linear(last, sizes["vocab"]))
        inputs = [ids, self.cos, self.sin, self.mask, self.beam]
        return self.ov.Model([logits], self.sinks, inputs, "peer")

    def attention(self, x: Any, index: int) -> Any:
        op, heads, kv = self.op, self.sizes["heads"], self.sizes["kv_heads"]
        q = self.turned(self.heads(x, heads))
        k = self.kept(f"k{index}", self.turned(self.heads(x, kv)))
        v = self.kept(f"v{index}", self.heads(x, kv))
        mixed = op.scaled_dot_product_attention(q, k, v, self.mask, causal=False)
        mixed = op.transpose(mixed, np.array([0, 2, 1, 3]))
        joined = op.reshape(mixed, np.array([0, 0, heads * self.head]), special_zero=True)
        return self.linear(joined, self.sizes["hidden"], heads * self.head)

    def feed_forward(self, x: Any) -> Any:
        neurons = self.sizes["neurons"]
        gate = self.op.swish(self.linear(x, neurons))
        combined = self.op.multiply(gate, self.linear(x, neurons))
        return self.linear(combined, self.sizes["hidden"], neurons)

    def linear(self, x: Any, rows: int, cols: int | None = None) -> Any:
        op, cols = self.op, cols or self.sizes["hidden"]
        shape = [rows, cols // BLOCK, BLOCK]
        self.arrays.append(self.random.integers(0, 256, rows * cols // 2, dtype=np.uint8))
        nibbles = op.constant(self.ov.Tensor(self.arrays[-1], shape, self.ov.Type.i4))
        scales = op.constant(np.full((rows, cols // BLOCK, 1), 0.02 / 4.6, np.float16))
        weights = op.multiply(op.convert(nibbles, "f16"), scales)
        weights = op.reshape(weights, np.array([rows, cols]), special_zero=False)
        return op.matmul(x, op.convert(weights, "f32"), transpose_a=False, transpose_b=True)

    def norm(self, x: Any) -> Any:
        op, one = self.op, np.float32(1)
        mean = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        scaled = op.multiply(x, op.divide(one, op.sqrt(op.add(mean, np.float32(1e-5)))))
        return op.multiply(scaled, np.ones((1, 1, self.sizes["hidden"]), np.float32))

    def heads(self, x: Any, count: int) -> Any:
        x = self.linear(x, count * self.head)
        x = self.op.reshape(x, np.array([0, 0, count, self.head]), special_zero=True)
        return self.op.transpose(x, np.array([0, 2, 1, 3]))

    def turned(self, x: Any) -> Any:
        op = self.op
        left, right = op.split(x, np.array(3), num_splits=2).outputs()
        other = op.concat([op.multiply(right, np.float32(-1)), left], 3)
        return op.add(op.multiply(x, self.cos), op.multiply(other, self.sin))

    def kept(self, name: str, new: Any) -> Any:
        """Behind those of the tokens before, once for each query head."""
        op, kv, heads = self.op, self.sizes["kv_heads"], self.sizes["heads"]
        shape = self.ov.PartialShape([1, kv, -1, self.head])
        none = op.constant(np.zeros((1, kv, 0, self.head), np.float32))
        before = op.read_value(none, name, self.ov.Type.f32, shape)
        every = op.concat([op.gather(before, self.beam, np.array(0)), new], 2)
        self.sinks.append(op.assign(every, name))
        wide = op.broadcast(
            op.unsqueeze(every, np.array(2)),
            np.array([1, 1, heads // kv, 1, 1]),
            None,
            "BIDIRECTIONAL",
        )
        return op.reshape(wide, np.array([0, heads, -1, self.head]), special_zero=True)


def inputs(sizes: dict[str, int], place: int, count: int) -> list[NDArray[Any]]:
    """Of `count` tokens at a place."""
    frequencies = 1e-4 ** np.linspace(0, 1, sizes["head"] // 2, endpoint=False)
    angles = np.tile(np.arange(place, place + count)[:, None] * frequencies, 2)[None, None]
    mask = np.triu(np.full((count, place + count), -np.inf, np.float32), place + 1)[None, None]
    ids = np.random.default_rng(place).integers(0, sizes["vocab"], (1, count))
    turn = [part.astype(np.float32) for part in (np.cos(angles), np.sin(angles))]
    return [ids, *turn, mask, np.zeros(1, np.int32)]


def engine(sizes: dict[str, int], threads: int) -> Callable[[int, int], Iterator[None]]:
    import openvino as ov

    graph = Graph(sizes)
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(graph.model(), "CPU", hints).create_infer_request()

    def run(prompt: int, decode: int) -> Iterator[None]:
        request.reset_state()
        request.infer(inputs(sizes, 0, prompt))
        yield
        for place in range(prompt, prompt + decode):
            request.infer(inputs(sizes, place, 1))

    return run


if __name__ == "__main__":
    answer(partial(engine, json.loads(sys.argv[1]), int(sys.argv[2])))
