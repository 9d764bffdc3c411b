"""Rounding that knows what errors of outputs cost: rows make up for each other.

Minimizes tr(F E H E^T) over the error E [N, K], where compensation (gptq.py) minimizes tr(E H E^T):
F [N, N] says how much the answers mind an error of each output and of two at once
(passes/output_gradients.py). GPTQ on the other side: rows are rounded in GROUPS, each as always,
and what is left to round moves by what makes up best for the error so far,

    E_rest = -F_rest,rest^-1 F_rest,done E_done.

Source: YAQA (arXiv 2505.22988), with groups of rows in place of its step per weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qig_serve.offline.rounding.gptq import Ranges, compensate
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask

GROUPS = 8
DAMPING = 0.3
"""Of F, as a fraction of each entry of its diagonal: its gradients are those of a few thousand
tokens, and errors that it sees nothing wrong in still change what the next layers are given."""
LEAST = 1e-3
"""Of an output's own energy, as a fraction of the mean."""


def compensate_outputs(
    task: RoundingTask, target: torch.Tensor, candidates: Sequence[Ranges]
) -> RoundedLinear:
    """`gptq.compensate` towards a target [N, K], group after group of rows."""
    assert task.outputs is not None
    costs = task.outputs.clone()
    energy = costs.diagonal().clone()
    energy.clamp_(min=float(LEAST * energy.mean().clamp(min=1e-30)))
    costs.diagonal().copy_(energy * (1 + DAMPING))
    # At random, so that outputs which make up for each other are in different groups.
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    groups = order.to(target.device).chunk(GROUPS)
    wanted, parts = target.clone(), []
    for number, rows in enumerate(groups, 1):
        ranges = [(s[rows], None if z is None else z[rows]) for s, z in candidates]
        part = compensate(task, wanted[rows], ranges)
        parts.append(part)
        if number < len(groups):
            rest = torch.cat(groups[number:])
            moved = costs[rest][:, rows] @ (wanted[rows] - part.dequantized())
            lower = torch.linalg.cholesky(costs[rest][:, rest])
            wanted[rest] += torch.cholesky_solve(moved, lower)
    found = RoundedLinear.joined(parts).rows(torch.cat(groups).argsort())
    found.report, found.target = parts[0].report, target
    return found
