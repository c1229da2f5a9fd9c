"""Greedy texts to compare engines by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

CLEAR = 5e-3  # logits: a greedy text is compared if no choice in it was closer than this


@torch.inference_mode()
def greedy(model: Any, prompts: Iterable[list[int]], count: int) -> tuple[list[int], list[int]]:
    """A prompt and its greedy tokens by a transformers model, the whole text read anew for each.

    Of several prompts it takes the first that leads to no near tie: a half-precision cache, or sums
    in another order, may then not change the text.
    """
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < CLEAR:
                break
            tokens.append(int(best.indices[0]))
        else:
            return prompt, tokens[len(prompt) :]
    raise AssertionError("every prompt leads to a near tie")
