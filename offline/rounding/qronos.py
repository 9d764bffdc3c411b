"""GPTQ towards the full-precision output, with ranges that suit compensation.

Target. The inputs x_q that the quantized layers before give differ from those of the full-precision
model. T = W + W C H_d^-1 makes up for that: it minimizes sum_t lambda_t |W x_fp,t - T x_q,t|^2
(what Qronos, arXiv 2505.11695, starts from), as far as it holds on samples it was not fitted to.

Damping. As much as suits samples left out (hessian.validated_damping): on a real decoder with 64
texts GPTQ's 1% left several times the error on texts that it had not seen.

Ranges. Between a group's extremes and the range of least error lie candidates; each row is rounded
by GPTQ (gptq.py) with all of them and keeps the one that leaves least of its output error.

`qronos-outputs`, which qig+ takes, is the same with rows that make up for each other (outputs.py),
where all tokens pass a linear; experts are rounded as here.

Tried here and left out, because they lowered the error on calibration samples and not KL on
questions held out: a range search that decides without trying (on a real decoder it does as well),
its repetition after compensation, refitted scales and descent over codes (with validated damping,
too: 5% less error on a real decoder, the same KL), learned rounding, token weights in the Hessian,
the quantized prefix as the search's input, GPTAQ's shift (arXiv 2504.02692), and Qronos' shift
without validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qig_serve.offline.rounding.gptq import Ranges, compensate
from qig_serve.offline.rounding.outputs import compensate_outputs
from qig_serve.offline.rounding.ranges import search_range
from qig_serve.offline.rounding.rounded import RoundedLinear, RoundingTask
from qig_serve.packing import grouped, minmax_params, round_scale


def round_weight(task: RoundingTask) -> RoundedLinear:
    """See rounding/linear.py."""
    target, shift = validated_target(task.weight, task.moments.halves)
    rounding = compensate if task.outputs is None else compensate_outputs
    rounded = rounding(task, target, candidate_ranges(task))
    found = {"shift": shift.strength, "shift_damp": shift.damp}
    return replace(rounded, report=rounded.report.model_copy(update=found))


RANGES_BETWEEN = (1 / 3, 2 / 3)
"""How far between the two ends the other candidates lie."""


def candidate_ranges(task: RoundingTask) -> list[Ranges]:
    """From each group's extremes to the range that costs least if rounding errors stay as they are.

    GPTQ's loss of a column is 1 / U_kk^2 times its squared rounding error (Factor), so ranges are
    searched in that metric. It does not see that a weight which is cut off makes others larger,
    which are then cut off too: rows differ in what that costs, and try all.
    """
    scheme, stored = task.scheme, task.stored
    low, low_zero = minmax_params(task.weight, scheme, stored)
    energy = task.factor.conditional_energy()
    metric = grouped(energy[None], scheme.num_groups(len(energy)))[0]
    high, zero = search_range(
        task.weight, scheme, stored, metric, grid=16, smallest=0.4, zero_window=1
    )
    between = [(round_scale(low ** (1 - t) * high**t, stored), zero) for t in RANGES_BETWEEN]
    return [(low, low_zero), *between, (high, zero)]


SHIFT_DAMPS = (0.03, 0.3, 3.0)
"""Damping tried for a validated shift, as a fraction of each input's own energy."""


@dataclass(frozen=True)
class Validated:
    """What cross-validation chose for a target shift."""

    strength: float
    """Fraction of the shift that is applied; 0: no shift helps inputs it was not fitted to."""
    damp: float
    gain: float
    """Drop of the squared output error on inputs left out, summed over both halves."""


def validated_target(
    weight: torch.Tensor, halves: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, Validated]:
    """The shifted target T [N, K], as much of it as holds on samples left out.

    `halves` are (H, C) [K, K] of two disjoint sets of samples. The shift S = W C H_d^-1 is a
    regression with K unknowns per row on inputs that differ little and noisily, and fits noise
    where samples are few. So each half's shift, at each damping, is judged by the other: with
    strength a it lowers sum_t lambda_t |W (x_fp - x_q)_t - a S x_q,t|^2 there by
    2 a <S, W C> - a^2 <S H, S>.
    The damping with the largest drop at its best strength, at most 1, is applied to both halves
    together.
    """
    crosses = [weight @ c for _, c in halves]

    def shift(hessian: torch.Tensor, cross: torch.Tensor, damp: float) -> torch.Tensor:
        damped = hessian.clone()
        energy = damped.diagonal()
        energy += torch.where(energy > 0, damp * energy, torch.ones_like(energy))
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return torch.zeros_like(cross)
        return torch.cholesky_solve(cross.T, lower).T

    best = Validated(0.0, SHIFT_DAMPS[0], 0.0)
    for damp in SHIFT_DAMPS:
        along = across = 0.0
        for fitted, judge in ((0, 1), (1, 0)):
            s = shift(halves[fitted][0], crosses[fitted], damp)
            along += float((s * crosses[judge]).double().sum())
            across += float(((s @ halves[judge][0]) * s).double().sum())
        if along <= 0 or across <= 0:
            continue
        strength = min(along / across, 1.0)
        gain = 2 * strength * along - strength**2 * across
        if gain > best.gain:
            best = Validated(strength, damp, gain)
    if best.strength == 0:
        return weight, best
    both = halves[0][0] + halves[1][0]
    s = shift(both, crosses[0] + crosses[1], best.damp)
    return weight + best.strength * s, best
