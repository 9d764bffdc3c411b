"""GPTQ: each column's rounding error is made up for by the columns that follow it.

Minimizes f(Q) = tr((T - Q) H (T - Q)^T) over dequantized weights Q [N, K], with the target T the
weight and H = sum_t lambda_t x_t x_t^T [K, K]. Asymmetric or symmetric as the scheme is, act-order,
static groups. Weighted by QIG's token weights (the paper's table 5) it is the method `gptq-qig`: on
the bundled model KL 0.0122 for GPTQ's 0.0079 at w3a16, 0.0040 for 0.0050 at w4a8 (300 questions,
tests/benchmarks/results/compare-llava-gptq-qig.json).
Source: GPTQ (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qig_serve.formats import QuantScheme, group_inputs
from qig_serve.offline.passes.hessian import Factor
from qig_serve.offline.results import LinearReport
from qig_serve.offline.rounding.columns import column_rounding
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask, objective
from qig_serve.packing import minmax_params

Ranges = tuple[torch.Tensor, torch.Tensor | None]
"""Scale fp32 and zero point uint8 (None if symmetric) of a weight's groups, [N, G]."""


def round_weight(task: RoundingTask) -> RoundedLinear:
    """See rounding/linear.py."""
    minmax = minmax_params(task.weight, task.scheme, task.stored)
    return compensate(task, task.weight, [minmax])


ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 27}
"""Of targets that are rounded together, all candidates counted: five times as many in fp32 wait."""


def compensate(
    task: RoundingTask, target: torch.Tensor, candidates: Sequence[Ranges]
) -> RoundedLinear:
    """GPTQ towards a target [N, K]: each row with those of the candidates' ranges that suit it.

    Rows do not touch each other, so that each can have what leaves least of its part of f.
    """
    (n, k), count = target.shape, len(candidates)
    rows = max(1, ELEMENTS.get(target.device.type, 1 << 27) // (k * count))
    found = []
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        scale = torch.cat([scale[part] for scale, _ in candidates])
        zeros = [zero[part] for _, zero in candidates if zero is not None]
        zero = torch.cat(zeros) if zeros else None
        wanted = target[part].repeat(count, 1)
        codes = compensated_codes(wanted, task.factor, task.scheme, scale, zero)
        rounded = RoundedLinear(codes, scale, zero)
        if count > 1:
            left = objective(wanted - rounded.dequantized(), task.moments.hessian)
            best = left.view(count, -1).argmin(0)
            row = torch.arange(len(best), device=best.device)
            rounded = rounded.rows(best * len(best) + row)
        found.append(rounded)
    factor = task.factor
    raised = 10**factor.raised if factor.raised else None
    report = LinearReport(damping=factor.fraction, damping_raised=raised)
    whole = found[0] if len(found) == 1 else RoundedLinear.joined(found)
    return replace(whole, report=report, target=target)


def compensated_codes(
    target: torch.Tensor,
    factor: Factor,
    scheme: QuantScheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block_size: int = 128,
) -> torch.Tensor:
    """Codes [N, K] of a target [N, K] with fixed scales and zero points [N, G].

    Groups are those of the original order of columns ("static"), whatever order the factor has, so
    the stored layout does not change. `block_size` columns are updated lazily together, without
    effect on the result beyond rounding.
    """
    n, k = target.shape
    order, upper = factor.order, factor.upper
    group = torch.arange(k, device=target.device) // group_inputs(k, scale.shape[1])
    w = target.T[order].contiguous()  # [K, N]: a column of the weight is a row here
    dtype = torch.int8 if scheme.symmetric else torch.uint8
    codes = torch.empty(k, n, dtype=dtype, device=target.device)
    round_block = column_rounding(target.device)
    for start in range(0, k, block_size):
        columns = order[start : start + block_size]
        stop = start + len(columns)
        scales = scale.T[group[columns]]
        zeros = None if zero is None else zero.float().T[group[columns]]
        ends = scheme.qmin, scheme.qmax
        u = upper[start:stop, start:stop]
        codes[columns], errors = round_block(w[start:stop], scales, zeros, u, ends, dtype)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()
