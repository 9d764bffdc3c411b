"""Equalization scales, one channel at a time: those for which rounding is expected to hurt least.

The grid search (search.py) moves along one curve, s_c = a_c^r; a channel that the curve does not
fit stays wrong. Take rounding as uniform noise of one step's width instead (step^2 / 12), of the
weights at their min-max ranges and, for w4a8, of each token's int8 codes. The expected squared
error of a group's linears on the calibration tokens, weighted by lambda, is then (times 12)

    E(s) = sum_g [ sum_n d_ng(s)^2 ] [ sum_{k in g} m_k / s_k^2 ]
         + [ sum_t lambda_t (max_k |x_tk| / s_k / 127)^2 ] [ sum_k w_k s_k^2 ]

    m_k = sum_t lambda_t x_tk^2    w_k = sum_n W_nk^2    d_ng(s) = range of W_n diag(s) in g / qmax

which needs no forward pass. Where error compensation follows, m_k is what is left of an error in
column k once the columns after it have made up for it, 1 / U_kk^2 of GPTQ's factor of the same
second moments (Factor.conditional_energy): channels that others can stand in for need
no finer steps. (Weights only: with int8 activations, whose errors nothing makes up for, it did
worse on three trained models of four.)

E's gradient in log s is closed: a range moves with the one or two channels that span it, a token's
step with its largest channel. Adam walks down log E from the point of the search's grid where E is
least. The weights lambda are those of the search (QIG's, arXiv 2603.17809), which so guide every
channel; the noise model is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.hessian import add_products, conditional_energy
from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.recipe import Damping
from qig_serve.packing import grouped

STEPS, RATE = 150, 0.03
MAX_TOKENS = 4096
"""Tokens whose largest channels are followed; evenly spaced ones, if there are more."""


@dataclass
class TokenMoments:
    """What E needs of the tokens of this process."""

    energy: torch.Tensor
    """m [K]: sum over all tokens of lambda x^2."""
    sizes: torch.Tensor
    """|x| [T, K] of the tokens whose int8 steps are followed; [0, K] if none are."""
    weights: torch.Tensor
    """Their lambda [T], scaled so that they stand for all tokens."""
    hessian: torch.Tensor | None = None
    """sum over all tokens of lambda x x^T [K, K], if rounding compensates errors."""


@torch.no_grad()
def token_moments(
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
    total: int,
    activations: bool,
    compensates: bool = False,
) -> TokenMoments:
    """From (x [T, K], lambda [T]) of each part; `total` is the number of tokens in all parts.

    activations: whether they are quantized, so that single tokens matter. compensates: whether
    rounding makes up for errors in other columns, so that their correlations matter.
    """
    stride = max(1, -(-total // MAX_TOKENS))
    energies, sums, sizes, weights, seen = [], [], [], [], 0
    hessian = None
    for x, weight in parts:
        x, weight = x.float(), weight.float()
        energies.append(weight @ x.square())
        if compensates:
            if hessian is None:
                hessian = x.new_zeros(x.shape[1], x.shape[1])
            rooted = x * weight.sqrt()[:, None]
            add_products(hessian, rooted, rooted)
        sums.append(weight.sum())
        kept = slice(-seen % stride, None, stride) if activations else slice(0)
        sizes.append(x[kept].abs())
        weights.append(weight[kept])
        seen += len(x)
    found = torch.cat(weights)
    if len(found):
        found = found * (torch.stack(sums).sum() / found.sum().clamp(min=1e-30))
    return TokenMoments(torch.stack(energies).sum(0), torch.cat(sizes), found, hessian)


@dataclass(frozen=True)
class Noise:
    """E of one group: what it depends on, and the way down."""

    weights: Sequence[torch.Tensor]
    """[N, K] of the group's linears."""
    moments: TokenMoments
    scheme: QuantScheme
    channel_of: torch.Tensor
    """int64 [K]: the output of the previous op that feeds each input (query heads share those of a
    key/value head)."""
    damping: Damping | None = None
    """Of the compensation that follows, if the moments know of one."""
    ranks: Ranks = ALONE

    @cached_property
    def column_energy(self) -> torch.Tensor:
        """w [K]: the squares of all weights in each column."""
        return torch.stack([w.float().square().sum(0) for w in self.weights]).sum(0)

    @torch.no_grad()
    def quietest(self, starts: Sequence[torch.Tensor]) -> int:
        """Which of `starts`, scales [outputs of the previous op], has the least E."""
        columns = [scales.float()[self.channel_of] for scales in starts]
        energy = error_cost(self.moments, torch.ones_like(columns[0]), self.damping, self.ranks)
        values = [float(self.at(c, energy)[0]) for c in columns]
        return min(range(len(values)), key=values.__getitem__)

    @torch.no_grad()
    def minimize(self, start: torch.Tensor) -> torch.Tensor:
        """Scales [outputs of the previous op], fp32, normalized by sqrt(max s * min s)."""
        columns = start.float()[self.channel_of]
        energy = error_cost(self.moments, columns, self.damping, self.ranks)
        logs = start.float().log()
        logs.grad = torch.zeros_like(logs)
        adam = torch.optim.Adam([logs], lr=RATE)
        for step in range(STEPS):
            value, gradient = self.at(logs.exp()[self.channel_of], energy)
            gradient = gradient / value.clamp(min=1e-30)
            logs.grad.zero_().index_add_(0, self.channel_of, gradient)
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            adam.step()
        found = logs.exp()
        return found / (found.max() * found.min()).sqrt()

    def at(self, columns: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E at the scales `columns` [K] of the inputs, and its gradient [K] in log s.

        energy: m [K], see `error_cost`.
        """
        value, gradient = _weight_noise(self.weights, columns, energy, self.scheme)
        if self.scheme.activation_bits is not None:
            noise = _token_noise(self.moments, columns, self.scheme)
            self.ranks.sum(noise)
            tokens, largest = noise[0], noise[1:]
            spread = self.column_energy * columns.square()
            value = value + tokens * spread.sum()
            gradient = gradient + largest * spread.sum() + 2 * tokens * spread
        return value, gradient


def error_cost(
    moments: TokenMoments, columns: torch.Tensor, damping: Damping | None, ranks: Ranks = ALONE
) -> torch.Tensor:
    """m [K]; the order of compensation is that of the inputs divided by `columns` [K]."""
    energy = moments.energy.clone()
    ranks.sum(energy)
    if moments.hessian is None or damping is None:
        return energy
    hessian = moments.hessian / columns[:, None] / columns
    ranks.sum(hessian)
    left = conditional_energy(hessian, damping)
    return torch.where(energy > 0, left * columns.square(), energy)


def _weight_noise(
    weights: Sequence[torch.Tensor],
    columns: torch.Tensor,
    energy: torch.Tensor,
    scheme: QuantScheme,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first term of E, and its gradient [K] in log s."""
    k = len(columns)
    groups = scheme.num_groups(k)
    inputs = grouped((energy / columns.square())[None], groups)[0]
    steps = columns.new_zeros(groups)  # sum over n of d^2
    moved = torch.zeros_like(inputs)  # and its gradient
    for weight in weights:
        scaled = grouped(weight * columns, groups)
        if scheme.symmetric:
            width, where = scaled.abs().max(-1)
            ends = [(width, where)]
        else:
            high, where_high = scaled.max(-1)
            low, where_low = scaled.min(-1)
            high, low = high.clamp(min=0), -low.clamp(max=0)
            width, ends = high + low, [(high, where_high), (low, where_low)]
        step = width / scheme.qmax
        steps += step.square().sum(0)
        for end, where in ends:
            moved.T.scatter_add_(0, where, 2 * step * end / scheme.qmax)
    per_group = inputs.sum(-1)
    gradient = moved * per_group[:, None] - 2 * steps[:, None] * inputs
    return (steps * per_group).sum(), gradient.flatten()[:k]


def _token_noise(moments: TokenMoments, columns: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[1 + K]: sum_t lambda_t step_t^2, and its gradient in log s."""
    assert scheme.activation_bits is not None
    result = columns.new_zeros(1 + len(columns))
    if len(moments.sizes):
        largest, where = (moments.sizes / columns).max(-1)
        steps = moments.weights * (largest / (2 ** (scheme.activation_bits - 1) - 1)).square()
        result[0] = steps.sum()
        result[1:].index_add_(0, where, -2 * steps)
    return result
