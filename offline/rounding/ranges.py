"""Ranges of groups: scale and zero point by what an error inside a group costs.

Shapes: weight [N, K] in fp32; scale and zero point [N, G]; a metric is what an error costs inside
a group of S inputs: a quadratic form [G, S, S], or its diagonal [G, S].
"""

from __future__ import annotations

import torch

from qig_serve.formats import QuantScheme
from qig_serve.packing import grouped, minmax_params, round_scale

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}  # per candidate: L2 cache; a few 100 MB
_LEAST_SQUARES_STEPS = 3


def group_error(error: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """e^T M e of each group: error [n, G, S] -> [n, G]."""
    return (error * apply_metric(error, metric)).sum(-1)


def apply_metric(x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """M x of each group: x [n, G, S] -> [n, G, S]."""
    if metric.dim() == 2:
        return x * metric
    return torch.matmul(x.transpose(0, 1), metric).transpose(0, 1)


def search_range(
    weight: torch.Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype,
    metric: torch.Tensor,
    grid: int = 40,
    smallest: float = 0.35,
    zero_window: int = 2,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale [N, G] (fp32, rounded to `dtype`) and zero point [N, G] (uint8, or None if symmetric).

    For every group: `grid` scales from 1.0 down to `smallest` times the min-max scale, each with
    the zero points within `zero_window` of the min-max one; from the best, alternating least
    squares between codes and scale. The weighted round-to-nearest error `group_error` decides;
    min-max is among the candidates, so the result never does worse by that measure.
    """
    k = weight.shape[1]
    groups = scheme.num_groups(k)
    rows = max(1, _CHUNK_ELEMENTS.get(weight.device.type, 1 << 18) // k)
    scales, zeros = [], []
    for part in weight.float().split(rows):
        scale, zero = minmax_params(part, scheme, dtype)
        w = grouped(part, groups)
        best = _Best(w, scheme, dtype, metric, scale, None if zero is None else zero.float())
        lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        full = w.abs().amax(-1) / scheme.qmax if zero is None else (hi - lo) / scheme.qmax
        for shrink in torch.linspace(1.0, smallest, grid).tolist():
            candidate = round_scale(full * shrink, dtype)
            if best.zero is None:
                best.offer(candidate, None)
                continue
            # Shrinking both ends by one factor leaves -lo / scale, hence the zero point, in place.
            middle = (-lo / full.clamp(min=1e-12)).round()
            for offset in range(-zero_window, zero_window + 1):
                best.offer(candidate, (middle + offset).clamp(0, scheme.qmax))
        for _ in range(_LEAST_SQUARES_STEPS):
            best.offer(best.least_squares_scale(), best.zero)
        scales.append(best.scale)
        zeros.append(best.zero)
    scale = torch.cat(scales)
    if scheme.symmetric:
        return scale, None
    return scale, torch.cat([z for z in zeros if z is not None]).to(torch.uint8)


class _Best:
    """The best (scale, zero) so far of each group of a chunk of rows w [n, G, S]."""

    def __init__(
        self,
        w: torch.Tensor,
        scheme: QuantScheme,
        dtype: torch.dtype,
        metric: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
    ) -> None:
        self.w, self.scheme, self.dtype, self.metric = w, scheme, dtype, metric
        self.scale, self.zero = scale, zero
        self.error = group_error(self._levels(scale, zero) * scale[..., None] - w, metric)

    def _levels(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Round-to-nearest code minus zero point, [n, G, S]."""
        low: torch.Tensor | int = self.scheme.qmin
        high: torch.Tensor | int = self.scheme.qmax
        levels = (self.w / scale[..., None]).round_()
        if zero is None:
            return levels.clamp_(low, high)
        return torch.clamp(levels, low - zero[..., None], high - zero[..., None])

    def offer(self, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        error = group_error(self._levels(scale, zero) * scale[..., None] - self.w, self.metric)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def least_squares_scale(self) -> torch.Tensor:
        """argmin over s of (w - s c)^T M (w - s c) for the codes c of the present best."""
        levels = self._levels(self.scale, self.zero)
        weighted = apply_metric(levels, self.metric)
        energy = (weighted * levels).sum(-1)
        scale = (weighted * self.w).sum(-1) / energy.clamp(min=1e-30)
        return round_scale(torch.where(energy > 0, scale, self.scale), self.dtype)
