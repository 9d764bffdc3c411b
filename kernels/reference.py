"""The oracle: what every kernel must compute, in plain torch and fp32. No triton.

Inputs are those of the checkpoint (formats.py), so a wrong kernel layout cannot hide in here.
"""

from __future__ import annotations

import torch

from qig_serve import packing
from qig_serve.formats import SCHEMES


def w3a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] @ dequantized weight^T (+ bias) in fp32: [M, N]."""
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zero}
    out = x.float() @ packing.unpack_linear(tensors, SCHEMES["w3a16"]).t()
    return out if bias is None else out + bias.float()


def int_product(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Activation codes int8 [M, K] times weight codes, exact: int64 [M, N]."""
    weight = packing.unpack(packed, 4, signed=True)
    # Double holds every sum of products below 2^53 exactly and is far faster than int64 matmul.
    return (codes.double() @ weight.double().t()).to(torch.int64)


def w4a8_linear_quantized(
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """codes int8 [M, K], x_scale fp32 [M, 1]; integer product, rescaled (+ bias): fp32 [M, N]."""
    out = int_product(codes, packed).float() * x_scale * scale.float().t()
    return out if bias is None else out + bias.float()


def w4a8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x [M, K] a token, then `w4a8_linear_quantized`: fp32 [M, N]."""
    return w4a8_linear_quantized(*quantize_activation(x), packed, scale, bias)


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [M, K] and fp32 scale [M, 1], as the kernels have them.

    packing.quantize_activation with a product by 1 / scale, rounded once, for its quotient: where x
    / scale is within an ulp of a half, a code may be the next. scale is at least 2^-126 (1 for a
    token of zeros), and NaN, with zero codes, where a token has a NaN or an infinity.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest * torch.tensor(1 / 127, device=x.device)).clamp(min=2.0**-126)
    scale = torch.where(largest > 0, scale, 1.0)
    product = x.double() * (1 / scale).double()  # exact
    finite = largest.isfinite()
    codes = torch.where(finite, product, 0.0).round().to(torch.int8)
    return codes, torch.where(finite, scale, torch.nan)


INTERLEAVE = 2
"""Stored halves have every 2 * INTERLEAVE of K interleaved, as (0, 2, 1, 3): the order in which the
weight's bytes come in a register."""
_MOST = 32639  # 127 * 256 + 127
_GROUP = 128


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    """[..., K] in the order of the stored halves."""
    return values.unflatten(-1, (-1, 2, INTERLEAVE)).transpose(-1, -2).flatten(-3)


def _separated(values: torch.Tensor) -> torch.Tensor:
    """`_interleaved` undone."""
    return values.unflatten(-1, (-1, INTERLEAVE, 2)).transpose(-1, -2).flatten(-3)


def split_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] as 16-bit fixed point: halves int8 [M, 2, K], scale fp32 and sums int32 [K/128, M].

    A (token, group of 128) has unit s, the smallest power of two from 2^-126 with largest / s <=
    32639, and q = x / s rounded half to even = 256 * high + low. halves: the high ones, then the
    low, `_interleaved`; scale = s / 8; sums = 8 * sum of q. A group with a NaN or an infinity has
    scale NaN, the rest zero.
    """
    groups = x.unflatten(-1, (-1, _GROUP)).double()
    largest = groups.abs().amax(-1)
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 0.0)
    _, exponent = torch.frexp(largest / _MOST)  # = f * 2^exponent, f from 1/2 up to below 1
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    half = unit / 2
    unit = torch.where(half * _MOST >= largest, half, unit)
    unit = torch.where(largest > 0, unit, 0.0).clamp(min=2.0**-126)
    q = torch.where(finite[..., None], groups / unit[..., None], 0.0).round().to(torch.int32)
    high = (q + 128) >> 8
    halves = torch.stack([high, q - 256 * high], dim=1).flatten(2).to(torch.int8)
    scale = torch.where(finite, unit / 8, torch.nan).float()
    sums = 8 * q.sum(-1, dtype=torch.int32)
    return _interleaved(halves), scale.t().contiguous(), sums.t().contiguous()


def join_halves(halves: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `split_halves` stands for: fp64 [M, K]."""
    high, low = _separated(halves).double().unbind(1)
    q = (256 * high + low).unflatten(-1, (-1, _GROUP))
    return (q * (8 * scale.double().t())[..., None]).flatten(-2)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalized x, x + residual), both of x's dtype and each rounded once, from fp32.

    So vLLM computes it where it compiles (quantize_activation.py says where that is read);
    transformers' models round the sum before they normalize it, and again before the weight.
    """
    h = x.float() if residual is None else x.float() + residual.float()
    added = h.to(x.dtype)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype), added


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [M, 2 K], rounded once from fp32: [M, K] of its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rms_norm`, then `quantize_activation`: codes, scale, x + residual."""
    normalized, added = rms_norm(x, weight, eps, residual)
    return *quantize_activation(normalized), added


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul`, then `quantize_activation`."""
    return quantize_activation(silu_mul(gate_up))
