"""What a rounding method is given of one linear, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.hessian import LinearStats
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
    """The row of the rounding method, with the recipe's damping."""
    stats: LinearStats | None = None
    """Of the linear's inputs; None unless the row asks for them."""

    @property
    def moments(self) -> LinearStats:
        """`stats` of a method that asks for them."""
        assert self.stats is not None
        return self.stats


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

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in fp32 that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero)
