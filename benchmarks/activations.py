"""What coarser activations would cost: the perplexity of a q4 model in the reference.

    python benchmarks/activations.py PACKED HELD_OUT.txt [SEPARATOR]

Rounds what rows of 4 bits meet, in blocks of 32: to two int8 limbs, as the C++ core has it, and to
one, with scales that are powers of two or the finest. The columns of down stay as they are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from turbosparse.analysis.measure import windows
from turbosparse.engine import model
from turbosparse.engine.engine import Engine
from turbosparse.engine.scoring import log_probabilities
from turbosparse.hf.load import load_tokenizer
from turbosparse.ops import quant, reference
from turbosparse.training.readers import documents

TOKENS, WINDOW = 8_000, 512
# the largest integer, and whether scales are powers of two
FORMS = {"floats": (), "two limbs": (32512, 1), "one limb": (127, 1), "one, finest": (127, 0)}


def rounded(x: Tensor, form: tuple[int, ...]) -> Tensor:
    blocks = x.unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / form[0]).clamp(min=2.0**-100)
    scale = scale.log2().ceil().exp2() if form[1] else scale
    return ((blocks / scale).round() * scale).flatten(-2)


class Matrix(reference.Matrix):
    def __init__(self, packed: Any, cols: int, name: str, threads: int):
        super().__init__(packed, cols, name, threads)
        if name in quant.CODES:
            self.matmul = lambda x: (rounded(x, form) if form else x) @ self.weight.T


model.Matrix, plain = Matrix, reference.sparse_ffn
reference.sparse_ffn = lambda x, *a, **k: plain(rounded(x, form) if form else x, *a, **k)
packed, data, *separator = sys.argv[1:]
engine = Engine(packed, backend="torch")
texts = documents(Path(data), separator="".join(separator) or None)
nats: dict[str, list[float]] = {name: [] for name in FORMS}
for ids in windows(load_tokenizer(packed), texts, WINDOW, False, TOKENS, engine.config.vocab_size):
    for name, form in FORMS.items():  # noqa: B007
        logits = np.concatenate(list(engine.logits(ids[:-1])))
        nats[name].extend(-log_probabilities(logits, ids[1:]))
print(f"{engine.describe()}, {len(nats['floats'])} tokens")
for name, found in nats.items():
    more = np.subtract(found, nats["floats"])
    error = more.std() / len(more) ** 0.5
    print(f"  {name:12} {np.exp(np.mean(found)):.4f} {np.expm1(more.mean()):+.3%} ± {error:.3%}")
print(json.dumps({"nats": {name: float(np.mean(found)) for name, found in nats.items()}}))
