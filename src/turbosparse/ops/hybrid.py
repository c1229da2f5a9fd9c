"""A feed-forward in two places: hot neurons on the card, the others on the C++ core meanwhile."""

from __future__ import annotations

from torch import Tensor

from turbosparse.ops import Mode, cpu, gpu
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.rows import FFNRows


class Neurons:
    """The interface of `reference.Neurons`; of the rows the first `hot` lie on the card."""

    def __init__(
        self,
        rows: FFNRows,
        activation: str,
        threads: int,
        predictor: PackedPredictor | None = None,
        threshold: float = 0.0,
        *,
        hot: int,
    ):
        count, self.hot, self.cold = len(rows.gates), None, None
        if hot:
            part = slice(None, hot)
            own = predictor and _of(predictor, part)
            self.hot = gpu.Neurons(rows[part], activation, threads, own, threshold)
        if hot < count:
            part = slice(hot, None)
            own = predictor and _of(predictor, part)
            self.cold = cpu.Neurons(rows[part], activation, threads, own, threshold)

    def forward(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        """See `reference.Neurons.forward`."""
        if self.cold is None:
            assert self.hot is not None
            return self.hot.forward(x, residual, mode=mode)
        # first what waits for the card, then what the card does beside the core
        here, before = x.cpu(), residual.cpu()
        hot = self.hot and self.hot.forward(x, residual, mode=mode)
        y, counts = (part.to(x.device) for part in self.cold.forward(here, before, mode=mode))
        return (y + hot[0], counts + hot[1]) if hot else (y, counts)


def _of(predictor: PackedPredictor, neurons: slice) -> PackedPredictor:
    tensors = {
        name: part if name == "fc1" else part[neurons] for name, part in predictor.tensors.items()
    }
    return PackedPredictor(predictor.about, tensors)
