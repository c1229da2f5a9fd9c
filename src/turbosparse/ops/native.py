"""The C++ core's view of packed rows, in the mapped file. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbosparse import _core
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.rows import FFNRows


def neurons(
    rows: FFNRows,
    activation: str,
    predictor: PackedPredictor | None = None,
    threshold: float = 0.0,
    stored: Mapping[str, _core.StoredRows] = {},
) -> _core.Neurons:
    """The core's view of one feed-forward.

    What `stored` has of gate, pairs or bundles takes the place of the mapped rows.
    """
    view = predictor and _predictor(predictor, rows.hidden)
    parts: tuple[Any, Any] = stored.get("gate") or rows.gates, stored.get("pairs") or rows.pairs
    if rows.bundles is not None:
        parts = stored.get("bundles") or rows.bundles, None
    return _core.Neurons(
        *parts,
        rows.hidden,
        rows.quants,
        activation,
        view,
        threshold,
    )


def _predictor(packed: PackedPredictor, hidden: int) -> _core.Predictor:
    about, tensors = packed.about, packed.tensors
    if about.kind == "sign":
        return _core.Signs(tensors["signs"], hidden, packed.threshold)
    fc1 = _core.Matrix(tensors["fc1"], hidden, str(about.quant))
    fc2 = _core.Matrix(tensors["fc2"], fc1.rows, str(about.quant))
    return _core.LowRank(fc1, fc2, packed.threshold, about.input == "pre_norm")
