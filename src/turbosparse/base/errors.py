"""The error that a mistake in the input raises."""

from __future__ import annotations


class TurboSparseError(ValueError):
    """A mistake in the input: the message says what is wrong, which value, and what to do."""
