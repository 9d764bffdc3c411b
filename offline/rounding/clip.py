"""AWQ's clip search: the range of a group that costs its outputs least, then round to nearest.

Source: AWQ (arXiv 2306.00978), whose released code searches clip thresholds by the output error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qig_serve.formats import QuantScheme, group_inputs
from qig_serve.offline.rounding.ranges import search_range
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask
from qig_serve.packing import quantize


def round_weight(task: RoundingTask) -> RoundedLinear:
    """See rounding/linear.py."""
    metric = _range_metric(task.moments.hessian, task.scheme)
    scale, zero = search_range(task.weight, task.scheme, task.stored, metric)
    return RoundedLinear(quantize(task.weight, scale, zero, task.scheme), scale, zero)


def _range_metric(hessian: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The Hessian's own block of each group: [K, K] -> [G, S, S]."""
    k = len(hessian)
    groups = scheme.num_groups(k)
    size = group_inputs(k, groups)
    # Inputs never seen keep a little weight: they may occur after calibration.
    floor = 1e-6 * float(hessian.diagonal().mean()) or 1.0
    if missing := groups * size - k:
        hessian = F.pad(hessian, (0, missing, 0, missing))
    h = hessian.view(groups, size, groups, size)
    index = torch.arange(groups, device=h.device)
    return h[index, :, index] + floor * torch.eye(size, device=h.device)
