"""Rounds one linear: the method's choice of codes, checked and reported.

A rounding method is a file in this folder and a row of recipe.ROUNDINGS that names it. The file
has a deterministic function `round_weight(task: RoundingTask) -> RoundedLinear` (rounded.py),
which changes neither the weight nor the statistics.
"""

from __future__ import annotations

from importlib import import_module

import torch

from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.hessian import LinearStats
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask, objective
from qig_serve.packing import fake_quantize, grouped, minmax_params, scale_dtype, ungrouped


def round_linear(
    weight: torch.Tensor,
    stats: LinearStats | None,
    scheme: QuantScheme,
    dtype: torch.dtype,
    method: Rounding,
    name: str = "linear",
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RoundedLinear:
    """Quantizes a weight [N, K], for inputs with the given statistics if the method needs any.

    `dtype` is the model's; scales are rounded to what the scheme stores for it. The report is
    empty without statistics. UserError names the linear when weight or statistics are not finite.
    """
    stored = scale_dtype(scheme, dtype)
    _check_finite(name, weight, stats)
    weight = weight.float()
    # By name, so that the recipe lists the methods without importing torch.
    round_weight = import_module(f"{__package__}.{method.module}").round_weight
    task = RoundingTask(weight, scheme, stored, method, stats, outputs)
    rounded: RoundedLinear = round_weight(task)
    if stats is not None:
        _fill_report(rounded, weight, stats, scheme, stored)
    return rounded


def _fill_report(
    rounded: RoundedLinear,
    weight: torch.Tensor,
    stats: LinearStats,
    scheme: QuantScheme,
    stored: torch.dtype,
) -> None:
    """Errors of round-to-nearest and of the result, towards the method's target; ranges."""
    energy = float(objective(weight, stats.hessian).double().sum())
    target = weight if rounded.target is None else rounded.target

    def error(codes: torch.Tensor) -> float:
        found = objective(target - codes, stats.hessian).double().sum()
        return float(found) / max(energy, 1e-30)

    report = rounded.report
    report.tokens = stats.tokens
    report.error_rtn = error(fake_quantize(weight, scheme, stored))
    report.error = error(rounded.dequantized())
    report.clip_ratio, report.clipped = clipping(weight, rounded, scheme, stored)


def clipping(
    weight: torch.Tensor, rounded: RoundedLinear, scheme: QuantScheme, stored: torch.dtype
) -> tuple[float, float]:
    """What the chosen ranges do to a weight [N, K]: LinearReport's clip_ratio and clipped."""
    minmax, _ = minmax_params(weight, scheme, stored)
    scale = rounded.scale
    codes = grouped(weight, scale.shape[1]) / scale.clamp(min=1e-30)[..., None]
    if rounded.zero is not None:
        codes = codes + rounded.zero.float()[..., None]
    outside = (codes < scheme.qmin - 0.5) | (codes > scheme.qmax + 0.5)
    outside = ungrouped(outside, weight.shape[1])
    ratio = (scale / minmax.clamp(min=1e-30)).mean()
    return float(ratio), float(outside.float().mean())


def _check_finite(name: str, weight: torch.Tensor, stats: LinearStats | None) -> None:
    tensors = [("weight", weight)]
    if stats is not None:
        tensors.append(("calibration statistics", stats.hessian))
        tensors += [("full-precision calibration statistics", c) for _, c in stats.halves]
    for what, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}: the {what} hold NaN or infinity. If it is the weight, the checkpoint "
                "is damaged; if it is the statistics, run the model in bfloat16 or float32."
            )
