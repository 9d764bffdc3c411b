"""Rounding that knows what errors of outputs cost: rows make up for each other.

Minimizes tr(F E H E^T) over the error E [N, K], where compensation (gptq.py) minimizes tr(E H E^T):
F [N, N] says how much the answers mind an error of each output and of two at once
(passes/output_gradients.py). GPTQ on the other side: rows are rounded in GROUPS, each as always,
and what is left to round moves by what makes up best for the error so far,

    E_rest = -F_rest,rest^-1 F_rest,done E_done.

F is of a few thousand tokens' gradients, and fits them: on a real decoder, damped by 0.3, half of
64 texts left on the other half 0.6 to 0.75 of the cost at queries and keys, and more than without
at gate and up (first blocks, by hand). So it is damped as suits samples left out
(hessian.validated_damping), and where nothing helps the rows are rounded each for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qig_serve.offline.passes.hessian import validated_damping
from qig_serve.offline.rounding.gptq import Ranges, compensate
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask

GROUPS = 8
DAMPING = 0.1
"""The least, of F, as a fraction of each entry of its diagonal."""
FLOOR = 1e-3
"""Of an output's own energy, as a fraction of the mean."""


def compensate_outputs(
    task: RoundingTask, target: torch.Tensor, candidates: Sequence[Ranges]
) -> RoundedLinear:
    """`gptq.compensate` towards a target [N, K], group after group of rows."""
    assert task.outputs is not None
    held_out = validated_damping(task.outputs, DAMPING)
    told = {"outputs_damping": held_out.fraction, "outputs_held_out": held_out.cost}
    if held_out.cost >= 1:
        alone = compensate(task, target, candidates)
        return replace(alone, report=alone.report.model_copy(update=told))
    # At random, so that outputs which make up for each other are in different groups.
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    order = order.to(target.device)
    costs = (task.outputs[0] + task.outputs[1])[order[:, None], order]
    energy = costs.diagonal()
    energy.copy_(energy.clamp(min=float(FLOOR * energy.mean())) * (1 + held_out.fraction))
    # From the end, so that one factor has those of all that is left to round as its beginnings.
    left, size = len(target), -(-len(target) // GROUPS)
    lower = torch.linalg.cholesky(costs[: left - size, : left - size])
    wanted, parts, rounded = target.clone(), [], []
    while left:
        rest = max(0, left - size)
        rows = order[rest:left]
        ranges = [(s[rows], None if z is None else z[rows]) for s, z in candidates]
        part = compensate(task, wanted[rows], ranges)
        if rest:
            moved = costs[:rest, rest:left] @ (wanted[rows] - part.dequantized())
            wanted[order[:rest]] += torch.cholesky_solve(moved, lower[:rest, :rest])
        parts.append(part)
        rounded.append(rows)
        left = rest
    found = RoundedLinear.joined(parts).rows(torch.cat(rounded).argsort())
    return replace(found, report=parts[0].report.model_copy(update=told), target=target)
