"""Round to nearest, with the minimum and maximum of each group as its range."""

from __future__ import annotations

from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask
from qig_serve.packing import minmax_params, quantize


def round_weight(task: RoundingTask) -> RoundedLinear:
    """See rounding/linear.py."""
    scale, zero = minmax_params(task.weight, task.scheme, task.stored)
    return RoundedLinear(quantize(task.weight, scale, zero, task.scheme), scale, zero)
