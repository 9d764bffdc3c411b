"""Round to nearest, with the minimum and maximum of each group as its range."""

from __future__ import annotations

import torch

from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.hessian import LinearStats
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.rounding.rounded import RoundedLinear
from qig_serve.packing import minmax_params, quantize


def round_weight(
    weight: torch.Tensor,
    stats: LinearStats | None,
    scheme: QuantScheme,
    stored: torch.dtype,
    method: Rounding,
) -> RoundedLinear:
    """See rounding/linear.py."""
    scale, zero = minmax_params(weight, scheme, stored)
    return RoundedLinear(quantize(weight, scale, zero, scheme), scale, zero)
