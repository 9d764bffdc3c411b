"""What a rounding method is given of one linear, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.hessian import Factor, LinearStats
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.results import LinearReport
from qig_serve.packing import dequantize


@dataclass(frozen=True)
class RoundingTask:
    """One linear to be rounded."""

    weight: torch.Tensor
    """fp32 [N, K]."""
    scheme: QuantScheme
    stored: torch.dtype
    """In which the scheme stores scales."""
    method: Rounding
    """The row of the rounding method."""
    stats: LinearStats | None = None
    """Of the linear's inputs; None unless the row asks for them."""
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None
    """What errors of its outputs cost, as two halves of the samples see it: fp32 [N, N] each, mean
    of the diagonal of their sum 1. As `stats`."""

    @property
    def moments(self) -> LinearStats:
        """`stats` of a method that asks for them."""
        assert self.stats is not None
        return self.stats

    @property
    def factor(self) -> Factor:
        """The factored Hessian, of a method that compensates."""
        assert self.method.damping is not None
        return self.moments.factor(self.method.damping)


@dataclass
class RoundedLinear:
    """What is stored of a linear, and how good it is."""

    codes: torch.Tensor
    """[N, K], uint8, or int8 if the scheme is symmetric."""
    scale: torch.Tensor
    """fp32 [N, G], values that the stored dtype holds exactly."""
    zero: torch.Tensor | None
    """uint8 [N, G], or None if symmetric."""
    report: LinearReport = field(default_factory=LinearReport)
    target: torch.Tensor | None = None
    """fp32 [N, K]: what the codes approximate, where that is not the weight itself."""

    def to(self, device: torch.device | str) -> RoundedLinear:
        """The same on another device, without the target."""
        zero = None if self.zero is None else self.zero.to(device)
        return RoundedLinear(self.codes.to(device), self.scale.to(device), zero, self.report)

    def rows(self, index: torch.Tensor) -> RoundedLinear:
        """Some rows, int64."""
        zero = None if self.zero is None else self.zero[index]
        return RoundedLinear(self.codes[index], self.scale[index], zero)

    @staticmethod
    def joined(parts: Sequence[RoundedLinear]) -> RoundedLinear:
        """The rows of all parts."""
        zeros = [part.zero for part in parts if part.zero is not None]
        codes, scale = (torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scale"))
        return RoundedLinear(codes, scale, torch.cat(zeros) if zeros else None)

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in fp32 that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero)


def objective(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e^T H e of each row: error [N, K] -> [N]."""
    return ((error @ hessian) * error).sum(1)
