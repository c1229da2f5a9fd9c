"""A byte-level BPE tokenizer trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, context: int) -> Any:
    """A tokenizer for transformers; token 0 is `END`, which begins and ends documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, model_max_length=context
    )
