"""Text to look at: as much of each corpus, and in it of each file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import check_ids, load_tokenizer
from turbosparse.training.mixture import packed_sequences
from turbosparse.training.readers import document_streams

LENGTH = 512  # tokens of a sequence at most
STREAMS = 64  # that a folder's files are read in, in turn


def sequences(
    folder: Path,
    config: Any,
    data: list[Path],
    tokens: int,
    template: str = "{text}",
    separator: str | None = None,
) -> Tensor:
    """`draw`, for a model that looks at text: token ids ``[N, T]``."""
    if not data:
        raise TurboSparseError("give --data, a file or folder of text")
    length = min(tokens, config.max_position_embeddings, LENGTH)
    how = {"template": template, "separator": separator, "tokens": tokens, "length": length}
    return torch.tensor(draw(data, load_tokenizer(folder), config.vocab_size, **how))


def draw(
    data: list[Path], tokenizer: Any, vocabulary: int, *, tokens: int, length: int, **how: Any
) -> list[list[int]]:
    """Token ids of about this many tokens: as much of each of `data`, and in it of each file."""
    if tokens < 1:
        raise TurboSparseError(f"--tokens is {tokens}; give at least 1")
    each = -(-tokens // (length * len(data)))
    rows: list[list[int]] = []
    for path in data:
        streams = [
            packed_sequences(documents, tokenizer, length, append_eos=True)
            for documents in document_streams(path, STREAMS, **how)
        ]
        drawn = islice(_in_turn(streams), each)
        rows += [check_ids(row["input_ids"], tokenizer, vocabulary) for row in drawn]
    if not rows:
        raise TurboSparseError(
            f"the text of --data has fewer than {length} tokens; give more text, or fewer --tokens"
        )
    return rows


def _in_turn(streams: list[Iterator[Any]]) -> Iterator[Any]:
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)
