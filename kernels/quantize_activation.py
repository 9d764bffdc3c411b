"""Activations to int8, symmetric, one scale a token, in one pass; fused with what comes before.

A program holds a token's whole row in registers: read once, largest magnitude, write int8. The
arithmetic is that of packing.quantize_activation to the bit: correctly rounded divisions, and
round half to even, which adding and taking away 1.5 * 2^23 does for any magnitude below 2^22.

The fused forms round where the unfused modules round: RMSNorm to the model's dtype before and
after its weight, SiLU before the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23

MAX_K = 65536
"""Longest row that a program's registers hold: 64 KiB an array at 32 warps."""


@triton.jit
def _quantize_row(row, columns, token, codes_ptr, scale_ptr, K):
    """row fp32 [BLOCK_K], zero beyond K -> codes and scale of one token."""
    largest = tl.max(tl.abs(row), axis=0)
    scale = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
    rounded = (tl.div_rn(row, scale) + ROUND) - ROUND
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(codes_ptr + token * K + columns, rounded.to(tl.int8), mask=columns < K)
    tl.store(scale_ptr + token, scale)


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, scale_ptr, K, BLOCK_K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    _quantize_row(x, columns, token, codes_ptr, scale_ptr, K)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, codes_ptr, scale_ptr, added_ptr, K, eps,
    BLOCK_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    x = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * K + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(DTYPE)
        tl.store(added_ptr + token * K + columns, x, mask=inside)
    h = x.to(tl.float32)
    h = h * tl.math.rsqrt(tl.div_rn(tl.sum(h * h, axis=0), K.to(tl.float32)) + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    h = (h.to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)
    _quantize_row(h, columns, token, codes_ptr, scale_ptr, K)


@triton.jit
def silu_mul_quantize_kernel(gate_up_ptr, codes_ptr, scale_ptr, K, BLOCK_K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    DTYPE: tl.constexpr = gate_up_ptr.dtype.element_ty
    row = gate_up_ptr + token * (2 * K) + columns
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + K, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    h = (silu * up).to(DTYPE).to(tl.float32)
    _quantize_row(h, columns, token, codes_ptr, scale_ptr, K)


def row_options(k: int) -> dict[str, int]:
    """BLOCK_K and num_warps for rows of K: at most 64 elements a thread."""
    if k > MAX_K:
        raise ValueError(f"activation rows of {k} are longer than {MAX_K}")
    block_k = triton.next_power_of_2(k)
    return {"BLOCK_K": block_k, "num_warps": min(32, max(4, block_k // 1024))}


def _outputs(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape[0], k, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] contiguous -> codes int8 [M, K], scale fp32 [M]."""
    m, k = x.shape
    codes, scale = _outputs(x, k)
    if m:
        quantize_kernel[(m,)](x, codes, scale, k, **row_options(k))
    return codes, scale


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K], then `quantize`: codes, scale, x + residual (or x)."""
    m, k = x.shape
    codes, scale = _outputs(x, k)
    added = x if residual is None else torch.empty_like(x)
    if m:
        rms_norm_quantize_kernel[(m,)](
            x, residual, weight, codes, scale, added, k, eps,
            HAS_RESIDUAL=residual is not None, **row_options(k),
        )  # fmt: skip
    return codes, scale, added


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of [M, 2 K], then `quantize`: codes int8 [M, K], scale fp32 [M]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scale = _outputs(gate_up, k)
    if m:
        silu_mul_quantize_kernel[(m,)](gate_up, codes, scale, k, **row_options(k))
    return codes, scale


def split_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from qig_serve.kernels import launch, reference
    return reference.split_halves(x, launch.orders(x.device).activations)
