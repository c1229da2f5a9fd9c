"""The C++ core's view of packed rows, in the mapped file. Loads no torch."""

from __future__ import annotations

from turbosparse import _core
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.rows import FFNRows


def neurons(
    rows: FFNRows,
    activation: str,
    predictor: PackedPredictor | None = None,
    threshold: float = 0.0,
    stored: tuple[_core.StoredRows | None, _core.StoredRows] | None = None,
) -> _core.Neurons:
    """The core's view of one feed-forward; of `stored` gates and pairs take the place of those."""
    view = predictor and _predictor(predictor, rows.hidden)
    gates, pairs = stored or (None, None)
    return _core.Neurons(
        gates or rows.gates,
        pairs or rows.pairs,
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
