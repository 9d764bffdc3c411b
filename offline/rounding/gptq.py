"""GPTQ: each column's rounding error is made up for by the columns that follow it.

Minimizes f(Q) = tr((T - Q) H (T - Q)^T) over dequantized weights Q [N, K], with the target T the
weight and H = sum_t lambda_t x_t x_t^T [K, K]. Asymmetric or symmetric as the scheme is, act-order,
static groups. Weighted by QIG's token weights (the paper's table 5) it is the method `gptq-qig`: on
the bundled model KL 0.0122 for GPTQ's 0.0079 at w3a16, 0.0040 for 0.0050 at w4a8 (300 questions,
tests/benchmarks/results/compare-llava-gptq-qig.json).
Source: GPTQ (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

import torch

from qig_serve.formats import QuantScheme, group_inputs
from qig_serve.offline.passes.hessian import Factor
from qig_serve.offline.results import LinearReport
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask
from qig_serve.packing import minmax_params


def round_weight(task: RoundingTask) -> RoundedLinear:
    """See rounding/linear.py."""
    return compensate(task, task.weight)


def compensate(task: RoundingTask, target: torch.Tensor) -> RoundedLinear:
    """GPTQ towards a target [N, K], with the min-max ranges of the task's weight."""
    assert task.method.damping is not None
    factor = task.moments.factor(task.method.damping)
    scale, zero = minmax_params(task.weight, task.scheme, task.stored)
    codes = compensated_codes(target, factor, task.scheme, scale, zero)
    raised = 10**factor.raised if factor.raised else None
    return RoundedLinear(codes, scale, zero, LinearReport(damping_raised=raised), target)


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
    k = target.shape[1]
    order, upper = factor.order, factor.upper
    group = torch.arange(k, device=target.device) // group_inputs(k, scale.shape[1])
    scales = scale.T[group[order]]  # [K, N]
    low = torch.full_like(scales, scheme.qmin)
    high = torch.full_like(scales, scheme.qmax)
    if zero is not None:
        zeros = zero.float().T[group[order]]
        low, high = low - zeros, high - zeros
    w = target.T[order].contiguous()  # [K, N]: a column of the weight is a row here
    levels = torch.empty_like(w)
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        block = w[start:stop]
        u = upper[start:stop, start:stop]
        diagonal = u.diagonal().tolist()
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            level = (block[i] / scales[j]).round_().clamp_(low[j], high[j])
            levels[j] = level
            errors[i] = (block[i] - level * scales[j]) / diagonal[i]
            block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(levels)
    codes[order] = levels if zero is None else levels + zeros
    return codes.T.to(torch.int8 if scheme.symmetric else torch.uint8).contiguous()
