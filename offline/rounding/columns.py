"""A block of GPTQ's columns, by whatever this machine rounds them with.

On a GPU that is one launch of kernels/round_columns.py, once it has shown there that it rounds as
torch does; where it cannot (no Triton, no C compiler for its launcher) or does not, the loop in
torch, and a sentence in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from qig_serve.formats import SCHEMES
from qig_serve.packing import minmax_params

RoundBlock = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""As `round_columns` of kernels/round_columns.py, which see; it may write over the weight."""


def column_rounding(device: torch.device) -> RoundBlock:
    """What rounds columns on a device."""
    return _chosen(device)[0]


def slow_rounding(device: torch.device) -> str:
    """Why columns are not rounded by a kernel on this GPU; empty if they are, and on a CPU."""
    return _chosen(device)[1]


@functools.cache
def _chosen(device: torch.device) -> tuple[RoundBlock, str]:
    if device.type != "cuda":
        return in_torch, ""
    slow = f"columns are rounded in torch on {device}, which takes longer"
    try:
        from qig_serve.kernels.round_columns import round_columns

        wrong = share_of_rows_that_differ(round_columns, device)
    except Exception as error:  # of Triton: it, a C compiler or a cache's folder may be missing
        return in_torch, f"{slow}: kernels/round_columns.py cannot be used: {error}"
    if wrong > 0.1:
        return in_torch, f"{slow}: kernels/round_columns.py got {wrong:.0%} of rows wrong"
    return round_columns, ""


def share_of_rows_that_differ(candidate: RoundBlock, device: torch.device) -> float:
    """Of 256 rows of random weights, the worst scheme's; a few fall on the other side of a half."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 256, 128
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs += 2 * inputs.roll(1, 1)  # neighbours are alike, so that errors matter
    moments = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    upper = torch.linalg.cholesky(moments.inverse(), upper=True).to(device)
    shares = []
    for scheme in (scheme for scheme in SCHEMES.values() if scheme.servable):
        scale, zero = minmax_params(weight * 0.7, scheme, torch.float32)  # some are cut off
        scales, zeros = (
            None if one is None else one.float().T.expand(columns, rows).contiguous().to(device)
            for one in (scale, zero)
        )
        dtype = torch.int8 if scheme.symmetric else torch.uint8
        ends = scheme.qmin, scheme.qmax
        got, wanted = (
            function(weight.T.contiguous().to(device), scales, zeros, upper, ends, dtype)[0]
            for function in (candidate, in_torch)
        )
        shares.append(float((got != wanted).any(0).float().mean()))
    return max(shares)


def in_torch(
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    upper: torch.Tensor,
    ends: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `round_columns` of kernels/round_columns.py. `w` is written over."""
    diagonal = upper.diagonal().tolist()
    low, high = torch.full_like(scales, ends[0]), torch.full_like(scales, ends[1])
    if zeros is not None:
        low, high = low - zeros, high - zeros
    levels, errors = torch.empty_like(w), torch.empty_like(w)
    for i in range(len(w)):
        level = (w[i] / scales[i]).round_().clamp_(low[i], high[i])
        levels[i] = level
        errors[i] = (w[i] - level * scales[i]) / diagonal[i]
        w[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return (levels if zeros is None else levels + zeros).to(dtype), errors
