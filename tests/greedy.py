"""Greedy texts to compare engines by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

CLEAR = 5e-3  # logits: a greedy text is compared if no choice in it was closer than this


@torch.inference_mode()
def greedy(
    logits: Callable[[list[int]], torch.Tensor],
    prompts: Iterable[list[int]],
    count: int,
    guess: Callable[[list[int]], list[int]],
) -> tuple[list[int], list[int]]:
    """A prompt and its greedy tokens by `logits`, which gives a row for each token of a text.

    A text is guessed, read, mended where its own logits choose otherwise, and read again until they
    agree. So the guess saves passes and decides nothing. Of several prompts it takes the first that
    leads to no near tie: a half-precision cache, or sums in another order, may then not change the
    text.
    """
    for prompt in prompts:
        tokens, chosen = [], guess(prompt)
        assert len(chosen) == count
        while tokens != chosen:
            tokens = chosen
            best = logits(prompt + tokens[:-1])[len(prompt) - 1 :].topk(2)
            chosen = best.indices[:, 0].tolist()
        if (best.values[:, 0] - best.values[:, 1]).min() >= CLEAR:
            return prompt, tokens
    raise AssertionError("every prompt leads to a near tie")


def of_transformers(model: torch.nn.Module) -> Callable[[list[int]], torch.Tensor]:
    """Logits after every token, the whole text read without a cache."""
    return lambda tokens: model(torch.tensor([tokens]), use_cache=False).logits[0]
