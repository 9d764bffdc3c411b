"""Error compensation of one linear: GPTQ, the target shifts of GPTAQ and Qronos, scale refit.

All of it minimizes the quadratic objective of one linear,

    f(Q) = tr((T - Q) H (T - Q)^T),     H = sum_t lambda_t x_t x_t^T  [K, K],

over dequantized weights Q [N, K]. T is the weight W itself, or a shifted target that makes up
for inputs that the quantized layers before have already changed (`shifted_target`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qig_serve.formats import QuantScheme
from qig_serve.packing import dequantize, round_scale


@dataclass(frozen=True)
class Factor:
    """The damped Hessian H_d [K, K] in the order of quantization, factored.

    `order` [K] int64 is the order; `upper` [K, K] fp32 is the upper triangular U with
    H_d[order][:, order]^-1 = U^T U, the factor that GPTQ's updates read row by row. `raised` is how
    many times the damping had to grow tenfold.
    """

    order: torch.Tensor
    upper: torch.Tensor
    raised: int = 0

    def conditional_energy(self) -> torch.Tensor:
        """What an error in column k costs once later columns have made up for it, [K].

        1 / U_kk^2, in the columns' original order: GPTQ's loss of step k is this times the
        squared rounding error.
        """
        energy = torch.empty_like(self.upper[0])
        energy[self.order] = self.upper.diagonal().square().reciprocal()
        return energy


def factorize(
    hessian: torch.Tensor, damp: float, act_order: bool, by_column: bool = False
) -> Factor:
    """Damp H [K, K], order its columns (descending energy if `act_order`) and factor it.

    Damping adds `damp` times the mean of the diagonal (GPTQ), or `by_column` times each column's
    own entry. The latter is invariant to scaling inputs: next to a few channels a thousand times
    as strong as the rest, the mean would drown all that the rest could make up for.
    Columns without energy get a unit diagonal: nothing is compensated for or by them. The
    Cholesky runs in fp64 and damping grows tenfold until it succeeds.
    Source: GPTQ (arXiv 2210.17323), section 3.3, step 3.
    """
    energy = hessian.diagonal()
    order = torch.arange(len(energy), device=hessian.device)
    if act_order:
        order = torch.argsort(energy, descending=True, stable=True)
    h = hessian.double()[order][:, order]
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    diagonal[dead] = mean
    added = diagonal if by_column else mean
    for power in range(7):
        # The factor of H reversed, reversed again, is upper triangular with H = R R^T; so
        # U = R^-1 has U^T U = H^-1: one Cholesky instead of GPTQ's two and an inverse.
        h.diagonal().copy_(diagonal + damp * 10**power * added)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0:
            r = lower.flip(0, 1)
            eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
            upper = torch.linalg.solve_triangular(r, eye, upper=True)
            return Factor(order, upper.float(), power)
    raise ArithmeticError("the Hessian is not positive semi-definite")


def shifted_target(
    weight: torch.Tensor, cross: torch.Tensor, factor: Factor, masked: bool, strength: float = 1.0
) -> torch.Tensor:
    """The target T [N, K] with which inputs x_q are made to give the outputs W x_fp.

    With C = sum_t lambda_t (x_fp - x_q)_t x_q,t^T [K, K], `masked` = False is the minimizer
    T = W + W C H_d^-1 of sum_t lambda_t |W x_fp,t - T x_q,t|^2 (what Qronos, arXiv 2505.11695,
    starts from). `masked` = True is GPTAQ (arXiv 2504.02692, theorem 4.2): the part of column q
    is made up for by the columns after q only, T = W + W P, P = ((C L) * M_U) L^T with
    H_d^-1 = L L^T and M_U strictly upper triangular, in the order of quantization. GPTAQ adds
    those terms while it goes; they do not depend on the codes, so adding them first is the same.
    """
    order = factor.order
    c = cross[order][:, order]
    lower = factor.upper.T  # L, since H_d^-1 = U^T U
    projected = c @ lower
    if masked:
        projected = projected.triu(1)
    shift = strength * (projected @ factor.upper)
    target = weight.clone()
    target[:, order] += weight[:, order] @ shift
    return target


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
    weight: torch.Tensor,
    halves: Sequence[tuple[torch.Tensor, torch.Tensor]],
    damps: Sequence[float] = SHIFT_DAMPS,
) -> tuple[torch.Tensor, Validated]:
    """The target T [N, K] of `shifted_target`, as much of it as holds on samples left out.

    `halves` are (H, C) [K, K] of two disjoint sets of samples. The shift S = W C H_d^-1 is a
    regression with K unknowns a row on inputs that differ little and noisily, and fits noise where
    samples are few. So each half's shift, at each damping, is judged by the other: with strength a
    it lowers sum_t lambda_t |W (x_fp - x_q)_t - a S x_q,t|^2 there by 2 a <S, W C> - a^2 <S H, S>.
    The damping with the largest drop at its best strength, at most 1, is applied to both halves
    together.
    """
    crosses = [weight.double() @ c.double() for _, c in halves]

    def shift(hessian: torch.Tensor, cross: torch.Tensor, damp: float) -> torch.Tensor:
        damped = hessian.double()
        energy = damped.diagonal()
        ridge = torch.where(energy > 0, damp * energy, torch.ones_like(energy))
        lower = torch.linalg.cholesky(damped + torch.diag(ridge))
        return torch.cholesky_solve(cross.T, lower).T

    best = Validated(0.0, damps[0], 0.0)
    for damp in damps:
        along = across = 0.0
        for fitted, judge in ((0, 1), (1, 0)):
            s = shift(halves[fitted][0], crosses[fitted], damp)
            along += float((s * crosses[judge]).sum())
            across += float(((s @ halves[judge][0].double()) * s).sum())
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
    return weight + (best.strength * s).to(weight.dtype), best


def objective(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e^T H e of each row: error [N, K] -> [N]."""
    return ((error @ hessian) * error).sum(1)


def gptq(
    target: torch.Tensor,
    factor: Factor,
    scheme: QuantScheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ with fixed scales and zero points [N, G]: codes [N, K], and what was rounded [N, K].

    The latter is each column of the target [N, K] after the columns before it have passed their
    errors on: f(Q) is the sum over columns of Factor.conditional_energy times the squared
    difference between it and Q. Groups are those of the original order of columns ("static"),
    whatever order the factor has, so the stored layout does not change.
    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    k = target.shape[1]
    order, upper = factor.order, factor.upper
    group = torch.arange(k, device=target.device) // (k // scale.shape[1])
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
    values = torch.empty_like(w)
    values[order] = w
    dtype = torch.int8 if scheme.symmetric else torch.uint8
    return codes.T.to(dtype).contiguous(), values.T.contiguous()


def refit_scales(
    target: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
    sweeps: int = 8,
) -> torch.Tensor:
    """Scales [N, G] that minimize f for given codes and zero points; never worse than `scale`.

    With c_g the codes minus zero point of group g, f is quadratic in a row's scales s:
    s^T A s - 2 b^T s, A_gh = c_g^T H_gh c_h, b_g = c_g^T (H t)_g. Starting from the present
    scales and from the joint solution A^-1 b, coordinate descent over groups, each step rounded
    to `dtype` (the nearest stored value minimizes a parabola), keeps the better of the two a row.
    Source: closed-form scale refit after rounding, arXiv 2602.02126.
    """
    n, k = target.shape
    groups = scale.shape[1]
    size = k // groups
    c = codes.float()
    if zero is not None:
        c = c - zero.float().repeat_interleave(size, 1)
    grouped = c.view(n, groups, size)
    a = torch.stack(
        [
            (
                (grouped[:, g] @ hessian[g * size : (g + 1) * size]).view(n, groups, size) * grouped
            ).sum(-1)
            for g in range(groups)
        ],
        dim=1,
    )  # [N, G, G]
    b = ((target @ hessian).view(n, groups, size) * grouped).sum(-1)  # [N, G]
    diagonal = a.diagonal(dim1=1, dim2=2)
    live = diagonal > 0
    ridge = torch.diag_embed(torch.where(live, 1e-6 * diagonal, torch.ones_like(diagonal)))
    joint = torch.linalg.solve((a + ridge).double(), b.double()).float()
    joint = torch.where(live & (joint > 0.25 * scale) & (joint < 4 * scale), joint, scale)

    def descend(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(sweeps):
            for g in range(groups):
                rest = b[:, g] - (a[:, g] * s).sum(1) + diagonal[:, g] * s[:, g]
                step = rest / diagonal[:, g].clamp(min=1e-30)
                keep = ~live[:, g] | (step <= 0)
                s[:, g] = torch.where(keep, s[:, g], round_scale(step, dtype))
        deq = dequantize(codes, s, zero)
        return s, objective(target - deq, hessian)

    start = objective(target - dequantize(codes, scale, zero), hessian)
    best = scale
    for candidate in (scale.clone(), round_scale(joint, dtype)):
        s, value = descend(candidate)
        better = value < start
        best = torch.where(better[:, None], s, best)
        start = torch.minimum(start, value)
    return best


def polish_codes(
    target: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scheme: QuantScheme,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block_size: int,
    sweeps: int = 1,
) -> torch.Tensor:
    """Coordinate descent over codes: each in turn becomes the best one given all others.

    Monotone in f. Columns in their stored order, `block_size` of them at a time against a
    running gradient, so that a sweep costs one N x K x K product. Source: QuantEase
    (arXiv 2309.01885), algorithm 1.
    """
    k = target.shape[1]
    group = torch.arange(k, device=target.device) // (k // scale.shape[1])
    scales = scale.T[group]  # [K, N]
    low = torch.full_like(scales, scheme.qmin)
    high = torch.full_like(scales, scheme.qmax)
    levels = codes.float().T.contiguous()
    if zero is not None:
        zeros = zero.float().T[group]
        low, high, levels = low - zeros, high - zeros, levels - zeros
    energy = hessian.diagonal()
    live = (energy > 0).tolist()
    inverse = energy.clamp(min=1e-30).reciprocal().tolist()
    error = target.T - levels * scales  # [K, N]
    gradient = hessian @ error
    for _ in range(sweeps):
        for start in range(0, k, block_size):
            stop = min(start + block_size, k)
            h = hessian[start:stop, start:stop]
            local = gradient[start:stop].clone()
            change = torch.zeros_like(local)
            for i in range(stop - start):
                j = start + i
                if not live[j]:
                    continue
                wanted = levels[j] + local[i] * inverse[j] / scales[j]
                level = wanted.round_().clamp_(low[j], high[j])
                change[i] = (level - levels[j]) * scales[j]
                levels[j] = level
                local.addr_(h[i], change[i], alpha=-1)
            gradient.addmm_(hessian[:, start:stop], change, alpha=-1)
    if zero is not None:
        levels = levels + zeros
    return levels.T.to(codes.dtype).contiguous()
