"""Second moments of a linear's inputs: gathered batch by batch, damped, and factored.

accumulator = StatsAccumulator(k)
accumulator.accumulate(x_q, token_weights=weights)      # once per batch
factor = accumulator.finish().factor(damping)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.recipe import Damping


@dataclass(frozen=True)
class Factor:
    """The damped Hessian H_d [K, K] in the order of quantization, factored.

    `order` [K] int64 is the order; `upper` [K, K] fp32 is the upper triangular U with
    H_d[order][:, order]^-1 = U^T U, the factor that GPTQ's updates read row by row. `fraction` is
    the damping's, `raised` how many times it had to grow tenfold.
    """

    order: torch.Tensor
    upper: torch.Tensor
    fraction: float
    raised: int = 0

    def conditional_energy(self) -> torch.Tensor:
        """What an error in column k costs once later columns have made up for it, [K].

        1 / U_kk^2, in the columns' original order: GPTQ's loss of step k is this times the
        squared rounding error.
        """
        energy = torch.empty_like(self.upper[0])
        energy[self.order] = self.upper.diagonal().square().reciprocal()
        return energy


def factorize(hessian: torch.Tensor, damping: Damping) -> Factor:
    """Damp H [K, K], order its columns by descending energy and factor it.

    Damping by column is invariant to scaling inputs: next to a few channels a thousand times as
    strong as the rest, the mean would drown all that the rest could make up for.
    Columns without energy get a unit diagonal: nothing is compensated for or by them. The
    Cholesky runs in fp64 and damping grows tenfold until it succeeds; ArithmeticError if it never
    does. Source: GPTQ (arXiv 2210.17323), section 3.3, step 3.
    """
    order, lower, power = _cholesky(hessian, damping)
    lower = lower.float()
    eye = torch.eye(len(lower), device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    del lower, eye  # of wide linears each is a gigabyte
    return Factor(order, inverse.flip(0, 1), damping.fraction, power)


def conditional_energy(hessian: torch.Tensor, damping: Damping) -> torch.Tensor:
    """`Factor.conditional_energy` of H [K, K], without the inverse that it is defined by: [K]."""
    order, lower, _ = _cholesky(hessian, damping)
    energy = torch.empty_like(hessian[0])
    energy[order] = lower.diagonal().flip(0).square().to(energy.dtype)
    return energy


def _cholesky(hessian: torch.Tensor, damping: Damping) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The order of quantization, the factor of H_d in the reverse of it, and damping's growth.

    The factor L reversed, R, is upper triangular with H_d = R R^T in order; so U = R^-1 has
    U^T U = H_d^-1: one Cholesky instead of GPTQ's two and an inverse.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    back = order.flip(0)
    h = hessian[back[:, None], back].double()
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    diagonal[dead] = mean
    added = diagonal if damping.by == "column" else mean
    for power in range(7):
        h.diagonal().copy_(diagonal + damping.fraction * 10**power * added)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            return order, lower, power
    raise ArithmeticError("the Hessian is not positive semi-definite")


MULTIPLES = (1, 3, 10, 30, 100)
"""Of the least damping, that validation tries."""
_ROWS = 2048
"""Columns whose errors it follows; evenly spaced ones, if there are more."""


@dataclass(frozen=True)
class HeldOut:
    """What damping does for tokens that compensation has not seen."""

    fraction: float
    """The damping that suits them."""
    cost: float
    """What their error is then, as a fraction of that without compensation."""


def validated_damping(halves: Sequence[torch.Tensor], least: float) -> HeldOut:
    """The damping, not below the least, that suits tokens which compensation has not seen.

    Compensation fits the tokens it has seen; on others it leaves several times the error, where
    inputs are many or tokens of few kinds. `halves` are the moments H [K, K] of two halves of the
    samples. Rounding noise d of one variance in all columns becomes the weight's error d M,
    M = diag(U)^-1 U, of which each half's factor is judged by the other half's H:
    sum_k (M H M^T)_kk. Of MULTIPLES of the least the best is halved, for the factor to be will
    have seen twice as much. In fp32, on moments scaled to a unit diagonal, so that it costs little
    beside that factor.
    """
    energy = halves[0].diagonal() + halves[1].diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    order = order[energy[order] > 0]
    # In reverse, as in `_cholesky`: of two columns the one that is rounded later comes first.
    back = order.flip(0)
    scale = energy[back].rsqrt()
    scaled = [h[back[:, None], back].mul_(scale[:, None]).mul_(scale) for h in halves]
    rows = torch.arange(0, len(back), -(-len(back) // _ROWS) or 1, device=back.device)
    wanted = torch.zeros(len(rows), len(back), device=back.device)
    wanted[torch.arange(len(rows)), rows] = 1

    def held_out(fitted: torch.Tensor, judge: torch.Tensor, fraction: float) -> float:
        damped = fitted.clone()
        seen = fitted.diagonal()
        damped.diagonal().copy_(torch.where(seen > 0, seen * (1 + fraction), 1))
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info):
            return math.inf
        m = torch.linalg.solve_triangular(lower, wanted, upper=False, left=False)
        m /= m.gather(1, rows[:, None])
        return float((((m @ judge) * m).sum(1) * energy[back[rows]]).double().sum())

    best, fraction = math.inf, least
    for tried in (least * multiple for multiple in MULTIPLES):
        cost = held_out(scaled[0], scaled[1], tried) + held_out(scaled[1], scaled[0], tried)
        if cost > best:
            break
        if cost < best:
            best, fraction = cost, tried
    alone = float(energy[back[rows]].double().sum())
    return HeldOut(max(fraction / 2, least), best / alone if alone > 0 else math.inf)


_WIDE, _PARTS = 1024, 8
"""From which width on a square is made of parts, and of how many."""


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total [N, K] += left^T right, of [T, N] and [T, K], all fp32; on a GPU by its tensor cores.

    These read TF32, 10 bits of mantissa, of which bf16 needs 7, and sum in fp32. Without them the
    moments of wide linears would take most of a large model's calibration. Of a wide square (left
    is right) little more than half is computed, and the rest is copied.
    """
    n = left.shape[1]
    step = -(-n // _PARTS)
    before = torch.get_float32_matmul_precision()
    if total.is_cuda:
        torch.set_float32_matmul_precision("high")
    try:
        if left is not right or n < _WIDE:
            total.addmm_(left.T, right)
            return
        for start in range(0, n, step):
            stop = start + step
            total[start:, start:stop].addmm_(left[:, start:].T, left[:, start:stop])
            total[start:stop, stop:] = total[stop:, start:stop].T
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class LinearStats:
    """Token-weighted second moments of a linear's input, sum of token weights normalized to 1."""

    hessian: torch.Tensor
    """sum_t lambda_t x_q,t x_q,t^T, fp32 [K, K]: of the inputs the quantized layers before give."""
    tokens: int
    """Tokens with a positive weight."""
    halves: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Of two halves of the samples (H, C): H as above, their sum is `hessian`; C = sum_t lambda_t
    (x_fp - x_q)_t x_q,t^T, fp32 [K, K]. Empty unless the accumulator was made with `shifted`."""
    _factors: dict[Damping, Factor] = field(default_factory=dict, repr=False)

    def factor(self, damping: Damping) -> Factor:
        """The factored Hessian; kept, since fused linears (q, k, v; gate, up) share their input."""
        if damping not in self._factors:
            used = damping
            if damping.validated:
                found = validated_damping([h for h, _ in self.halves], damping.fraction)
                used = replace(damping, fraction=found.fraction, validated=False)
            self._factors[damping] = factorize(self.hessian, used)
        return self._factors[damping]


class StatsAccumulator:
    """Sums LinearStats over batches of tokens; if `shifted`, two halves of the samples apart."""

    def __init__(self, k: int, shifted: bool = False, device: torch.device | str = "cpu") -> None:
        def zeros(count: int) -> list[torch.Tensor]:
            return [torch.zeros(k, k, device=device) for _ in range(count)]

        self._hessians, self._crosses = zeros(2 if shifted else 1), zeros(2 if shifted else 0)
        self._weight = 0.0
        self._tokens = 0

    def accumulate(
        self,
        x_q: torch.Tensor,
        x_fp: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        half: int = 0,
    ) -> None:
        """Add T tokens: x_q and x_fp [T, K], token_weights [T] >= 0 (None: all one).

        If `shifted`, x_fp is needed, the same tokens' input in the full-precision model, and
        `half` says to which of the halves, 0 or 1, the tokens belong.
        """
        x_q = x_q.float()
        if token_weights is None:
            weights = torch.ones(len(x_q), device=x_q.device)
        else:
            weights = token_weights.to(x_q.device).float()
        if weights.shape != x_q.shape[:1] or bool((weights < 0).any()):
            raise ValueError(
                f"token weights must be non-negative, one per token: {tuple(weights.shape)} "
                f"for inputs {tuple(x_q.shape)}"
            )
        keep = weights > 0
        # The root, because it enters twice: H = (sqrt(lambda) X)^T (sqrt(lambda) X).
        root = weights[keep].sqrt()[:, None]
        left = x_q[keep] * root
        add_products(self._hessians[half], left, left)
        if self._crosses:
            if x_fp is None:
                raise ValueError("the accumulator was made with shifted=True: x_fp is needed")
            delta = (x_fp.float() - x_q)[keep] * root
            add_products(self._crosses[half], delta, left)
        self._weight += float(weights.double().sum())
        self._tokens += int(keep.sum())

    def finish(self, ranks: Ranks = ALONE) -> LinearStats:
        """The statistics of all processes, divided by the sum of token weights.

        ValueError when that is zero.
        """
        weight, tokens = ranks.total(self._weight, self._tokens)
        for tensor in (*self._hessians, *self._crosses):
            ranks.sum(tensor)
        if not weight > 0:
            raise ValueError("no token with a positive weight was accumulated")
        for tensor in (*self._hessians, *self._crosses):
            tensor.div_(weight)
        if not self._crosses:
            return LinearStats(self._hessians[0], int(tokens))
        halves = tuple(zip(self._hessians, self._crosses, strict=True))
        return LinearStats(self._hessians[0] + self._hessians[1], int(tokens), halves)
