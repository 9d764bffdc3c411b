"""The oracle: what every kernel must compute, in plain torch and fp32. No triton.

Inputs are those of the checkpoint (formats.py), so a wrong kernel layout cannot hide in here.
"""

from __future__ import annotations

import torch

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import layout


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
    """int8 codes [M, K] and fp32 scale [M, 1]; see packing.quantize_activation."""
    return packing.quantize_activation(x)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalized x, x + residual), both of x's dtype, rounded where transformers' models round."""
    added = x if residual is None else x + residual
    h = added.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight, added


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rms_norm`, then `quantize_activation`: codes, scale, x + residual."""
    normalized, added = rms_norm(x, weight, eps, residual)
    return *quantize_activation(normalized), added


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of [M, 2 K], both roundings in the input's dtype; then quantized."""
    gate, up = gate_up.chunk(2, dim=-1)
    return quantize_activation(torch.nn.functional.silu(gate.float()).to(up.dtype) * up)


def split_halves(x: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] (16 bits) as 16-bit fixed point, a scale a (token, group of 128 inputs).

    halves int8 [M, 2, K]: x = s * (256 * high + low), inputs of a group in `order` (layout.ORDERS).
    x_scale_sum int32 [pairs, M, 2]: bits 23-30 are those of s / 8 in fp32, a power of two, and bits
    0-22 minus the sum of 256 * high + low over the group, in two's complement. s is the smallest
    with the group's largest magnitude at most 32639 * s, and at least 2^-123; a group with NaN or Inf
    has the exponent of infinity, and zeros.
    """
    m, k = x.shape
    groups = x.float().reshape(m, k // layout.GROUP, layout.GROUP)
    largest = groups.abs().amax(2)
    finite = largest.isfinite()
    exponent = torch.ceil(torch.log2(largest.double() / 32639)).clamp(min=-123)
    exponent = torch.where(finite, exponent, 0).double()
    q = torch.where(finite[..., None], groups, 0).double() / torch.exp2(exponent)[..., None]
    q = q.round().to(torch.int32)  # half to even
    high = (q + 128) >> 8
    both = torch.stack([high, q - 256 * high], dim=1)[..., layout.ORDERS[order]]
    bits = torch.where(finite, exponent.to(torch.int32) + 124, 255) << 23
    word = bits | (-q.sum(2, dtype=torch.int32) & 0x7FFFFF)
    word = torch.nn.functional.pad(word, (0, groups.shape[1] % 2))
    x_scale_sum = word.reshape(m, -1, 2).transpose(0, 1).contiguous()
    return both.reshape(m, 2, k).to(torch.int8), x_scale_sum
