"""Compile the Triton kernels for cards that need not be there; `make lint` runs it.

The package's own functions are called with small tensors, and each launch of a kernel becomes a
compilation: what is compiled is what would run.
"""

import multiprocessing
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turbosparse.ops import gpu, gpu_attention
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.quant import quantise, quantise_ffn, signs

# bytes of shared memory that a program may have, by compute capability
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
READERS = "matvec", "select", "downs", "unpack"  # of packed rows: 16 bytes at a time
HIDDEN, NEURONS, HEADS, HEAD = 4096, 64, 32, 128


class Card:
    """A driver as far as compiling asks for one."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, _):
        return 0


def call_all(capability):
    """The kernels of every model in 4 bits; more forms for the newest card only, to save time."""
    newest = capability == max(SHARED)
    x, chosen = torch.randn(1, HIDDEN), torch.zeros(1, 2, dtype=torch.int32)
    for quant in ("f16", "q4") if newest else ("q4",):
        packed = quantise(torch.randn(NEURONS, HIDDEN), quant).numpy()
        gpu.Matrix(packed, HIDDEN, quant).matmul(x)
        gpu.Matrix(packed, HIDDEN, quant).rows([0])
        rows = quantise_ffn(torch.randn(3, NEURONS, HIDDEN), (quant,) * 3)
        gpu.Neurons(rows, "drelu").forward(x, x, mode="exact")
    if newest:
        gpu.Neurons(rows, "swiglu").forward(x, x, mode="dense")
        fc = [quantise(torch.randn(n, m), "q8").numpy() for n, m in ((64, HIDDEN), (NEURONS, 64))]
        low_rank = {"kind": "low_rank", "quant": "q8", "ranks": [[64]]}
        for about, tensors in (
            (low_rank, dict(zip(("fc1", "fc2"), fc, strict=True))),
            ({"kind": "sign"}, {"signs": signs(rows, 2)}),
        ):
            predictor = Predictor(input="post_norm", threshold=0.0, **about)
            experts = gpu.Experts([rows], "drelu", [PackedPredictor(predictor, tensors)])
            experts.forward(x, x, mode="predicted", chosen=chosen, weights=torch.ones(1, 2))
    heads = HEADS // 4
    where = gpu_attention.Where(*torch.zeros(3, 1, dtype=torch.int64))
    turn, k = torch.zeros(2, 1, HEAD), torch.zeros(1, heads * HEAD)
    gpu_attention.norm(x, x[0], None, 1e-5)
    gpu_attention.keep(x, k, k, *turn, where, 0, HEAD)
    gpu_attention.attend(x, where, 0, HEAD, heads, None)


def compile_for(capability):
    """By kernel, the bytes of shared memory of each of its forms."""
    found, launch = {}, JITFunction.run

    def compile_only(self, *args, **settings):
        kernel = launch(self, *args, **settings | {"warmup": True})
        found.setdefault(self.__name__, {})[kernel.hash] = kernel.metadata.shared
        if self.__name__ in READERS and "ld.global.v4" not in kernel.asm["ptx"]:
            raise RuntimeError(f"{self.__name__} for sm_{capability} reads its rows byte by byte")

    JITFunction.run = compile_only
    driver.set_active(Card(capability))
    call_all(capability)
    return {name: list(forms.values()) for name, forms in found.items()}


def main():
    cards = sorted(SHARED, reverse=True)  # that with the most forms first
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for card, kernels in zip(cards, pool.imap(compile_for, cards), strict=True):
            forms, most = sum(map(len, kernels.values())), max(map(max, kernels.values()))
            print(f"sm_{card}: {forms} kernels, at most {most} bytes of shared memory")
            if most > SHARED[card]:
                large = [name for name, sizes in kernels.items() if max(sizes) > SHARED[card]]
                names = ", ".join(large)
                return f"{names}: more shared memory than the {SHARED[card]} bytes of sm_{card}"
    return None


if __name__ == "__main__":
    sys.exit(main())
