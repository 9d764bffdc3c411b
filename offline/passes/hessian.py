"""Second moments of a linear's inputs: gathered batch by batch, damped, and factored.

accumulator = StatsAccumulator(k)
accumulator.accumulate(x_q, token_weights=weights)      # once per batch
factor = accumulator.finish().factor(damping)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.recipe import Damping


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


def factorize(hessian: torch.Tensor, damping: Damping) -> Factor:
    """Damp H [K, K], order its columns by descending energy and factor it.

    Damping by column is invariant to scaling inputs: next to a few channels a thousand times as
    strong as the rest, the mean would drown all that the rest could make up for.
    Columns without energy get a unit diagonal: nothing is compensated for or by them. The
    Cholesky runs in fp64 and damping grows tenfold until it succeeds; ArithmeticError if it never
    does. Source: GPTQ (arXiv 2210.17323), section 3.3, step 3.
    """
    energy = hessian.diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    h = hessian.double()[order][:, order]
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    diagonal[dead] = mean
    added = diagonal if damping.by == "column" else mean
    for power in range(7):
        # The factor of H reversed, reversed again, is upper triangular with H = R R^T; so
        # U = R^-1 has U^T U = H^-1: one Cholesky instead of GPTQ's two and an inverse.
        h.diagonal().copy_(diagonal + damping.fraction * 10**power * added)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0:
            r = lower.flip(0, 1)
            eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
            upper = torch.linalg.solve_triangular(r, eye, upper=True)
            return Factor(order, upper.float(), power)
    raise ArithmeticError("the Hessian is not positive semi-definite")


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
            self._factors[damping] = factorize(self.hessian, damping)
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
        self._hessians[half].addmm_(left.T, left)
        if self._crosses:
            if x_fp is None:
                raise ValueError("the accumulator was made with shifted=True: x_fp is needed")
            delta = (x_fp.float() - x_q)[keep] * root
            self._crosses[half].addmm_(delta.T, left)
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
