"""Learned rounding of all linears of a block together, on the block's own output.

Error compensation (compensation.py) treats one linear at a time and its loss as quadratic. Here
the codes and scales it found are the start, and the loss is whatever the caller computes from
the dequantized weights: the token-weighted error of the whole block, nonlinearities included.
Source: AutoRound / SignRound (arXiv 2309.05516): signed gradient descent on rounding offsets in
[-0.5, 0.5] and on the range, learning rate falling linearly, best step kept. Different from it:
the start is a compensated rounding, not round-to-nearest, and zero points stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from qig_serve.formats import QuantScheme
from qig_serve.offline.ranges import clipping
from qig_serve.offline.rounding import RoundedLinear
from qig_serve.packing import round_scale, scale_dtype

Loss = Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor]
"""loss(batch, weights): a scalar, differentiable in the weights [N, K] by name."""

_REACH = 0.25
"""How far from the middle of its rounding cell a start may lie, in steps. A compensated code
often lies a step or more from its weight: at the cell's edge, the first signed step would undo
all that compensation did."""


@dataclass(frozen=True)
class LearningOptions:
    """How long and how fast."""

    steps: int = 200
    """Gradient steps, a batch each."""
    offset_rate: float = 0.005
    """Largest first step of a rounding offset, in quantization steps."""
    scale_rate: float = 0.0005
    """Largest first step of a scale, relative."""
    check_every: int = 20
    """Steps between evaluations on all batches."""


class _Learned:
    """One linear's variables: rounding offset [N, K] and log of the scale's factor [N, G]."""

    def __init__(
        self, start: RoundedLinear, weight: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype
    ) -> None:
        self.start, self.scheme = start, scheme
        self.stored = scale_dtype(scheme, dtype)
        self.size = weight.shape[1] // start.scale.shape[1]
        self.zero = None if start.zero is None else start.zero.float()
        codes = start.codes.float()
        wanted = weight.float() / self._wide(start.scale)
        if self.zero is not None:
            wanted = wanted + self._wide(self.zero)
        self.latent = torch.minimum(torch.maximum(wanted, codes - _REACH), codes + _REACH)
        self.offset = torch.zeros_like(codes, requires_grad=True)
        self.log_factor = torch.zeros_like(start.scale, requires_grad=True)

    def _wide(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group.repeat_interleave(self.size, 1)

    def _rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale, both with straight-through gradients."""
        point = self.latent + self.offset
        codes = point + (point.round() - point).detach()
        codes = codes.clamp(self.scheme.qmin, self.scheme.qmax)
        exact = self.start.scale * self.log_factor.exp()
        scale = exact + (round_scale(exact.detach(), self.stored) - exact.detach())
        return codes, scale

    def weight(self) -> torch.Tensor:
        """The dequantized weight [N, K], differentiable in both variables."""
        codes, scale = self._rounded()
        levels = codes if self.zero is None else codes - self._wide(self.zero)
        return levels * self._wide(scale)

    @torch.no_grad()
    def step(self, offset_rate: float, scale_rate: float) -> None:
        """One step along the signs of the gradients, which are then dropped."""
        for variable, rate, bound in (
            (self.offset, offset_rate, 0.5),
            (self.log_factor, scale_rate, 0.5),
        ):
            if variable.grad is not None:
                variable.sub_(rate * variable.grad.sign()).clamp_(-bound, bound)
                variable.grad = None

    @torch.no_grad()
    def result(self) -> RoundedLinear:
        """What the variables stand for now."""
        codes, scale = self._rounded()
        # The sum of a value and its rounding residue can miss the stored value by one ulp.
        scale = round_scale(scale, self.stored)
        return replace(self.start, codes=codes.round().to(self.start.codes.dtype), scale=scale)


def learn_rounding(
    rounded: Mapping[str, RoundedLinear],
    weights: Mapping[str, torch.Tensor],
    scheme: QuantScheme,
    dtype: torch.dtype,
    loss: Loss,
    batches: int,
    options: LearningOptions | None = None,
) -> dict[str, RoundedLinear]:
    """Linears of a block, rounded so that `loss`, summed over batches, is least.

    `rounded` is the start and `weights` the full-precision weights [N, K] it came from; `dtype`
    is the model's. The result is the best of all evaluated steps, the start included, so the loss
    on the batches never rises. Each report gains `learned`: loss after over loss before.
    """
    options = options or LearningOptions()
    learned = {
        name: _Learned(start, weights[name], scheme, dtype) for name, start in rounded.items()
    }

    @torch.no_grad()
    def total(candidate: Mapping[str, RoundedLinear]) -> float:
        values = {name: linear.dequantized() for name, linear in candidate.items()}
        return sum(float(loss(b, values)) for b in range(batches))

    best = dict(rounded)
    first = least = total(best)
    for step in range(options.steps):
        rate = 1 - step / options.steps
        with torch.enable_grad():
            values = {name: variables.weight() for name, variables in learned.items()}
            loss(step % batches, values).backward()
        for variables in learned.values():
            variables.step(options.offset_rate * rate, options.scale_rate * rate)
        if (step + 1) % options.check_every == 0 or step + 1 == options.steps:
            candidate = {name: variables.result() for name, variables in learned.items()}
            value = total(candidate)
            if value < least:
                least, best = value, candidate
    ratio = least / max(first, 1e-30)
    return {
        name: replace(
            linear,
            report={
                **linear.report,
                "learned": ratio,
                **clipping(weights[name], linear.scale, linear.zero, scheme, learned[name].stored),
            },
        )
        for name, linear in best.items()
    }
