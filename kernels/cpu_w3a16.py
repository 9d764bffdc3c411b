"""w3a16 on a CPU: torch's int4 GEMM, and for many rows torch's GEMM on weights that stay in cache.

    packed  uint8 in torch's int4 layout: code - zero + 8
    scales  [groups, N, 2]: a scale and a zero offset

4.25 bits per weight. A 3-bit code minus its zero point lies in -7..7, so four bits hold it without
a zero point and nothing is rounded twice. fp32 is the reference: `weight` [N, K], plain arithmetic.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from qig_serve.kernels import cpu_w8a16
from qig_serve.kernels.layout import GROUP, whole_groups
from qig_serve.kernels.library import Prepared, define
from qig_serve.packing import dequantize

# Rows from which unpacking first wins: tests/benchmarks/bench_cpu.py, AVX-512.
MANY_ROWS = 48
SCRATCH = 1 << 20  # weights dequantized at a time: 2 MiB, about a core's L2

_N_BLOCK = 64  # torch's int4 layout has blocks of 64 output channels, padded here if need be


@functools.cache
def int4_block() -> int | None:
    """Output channels per block of torch's int4 layout, or None if it is not one read here.

    The layout is the processor's: [N / block, K, block / 2] bytes, the low nibbles the first half
    of the block's channels and the high nibbles the second. Found out rather than assumed.
    """
    codes = (torch.arange(_N_BLOCK * 32, dtype=torch.int32) * 7 // 3 % 16).reshape(_N_BLOCK, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32):
        tiles = packed.reshape(_N_BLOCK // block, 32, block // 2)
        read = torch.cat([tiles & 15, tiles >> 4], dim=-1)  # [blocks, K, block]
        if torch.equal(read.transpose(1, 2).reshape(_N_BLOCK, 32).int(), codes):
            return block
    return None


look_up = int4_block


def prepare(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> Prepared:
    """codes uint8 [N, K], scale and zero [N, groups] as at the head, for activations of `dtype`."""
    if dtype == torch.float32 or zero is None:
        return {"weight": dequantize(codes, scale, zero)}
    (n, k), groups = codes.shape, scale.shape[1]
    padding = -n % _N_BLOCK
    shift = 8 - zero.to(torch.int32).repeat_interleave(GROUP, dim=1)[:, :k]
    nibbles = codes.to(torch.int32) + shift  # [N, K]
    nibbles = F.pad(nibbles, (0, groups * GROUP - k, 0, padding), value=8)
    scales = torch.zeros(groups, n + padding, 2, dtype=dtype)
    scales[:, :n, 0] = scale.t()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    return {"packed": packed, "scales": scales}


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    """x [M, K], packed and scales as `prepare` made them: [M, N] in x's dtype."""
    block, x = int4_block(), whole_groups(x)
    if x.shape[0] < MANY_ROWS or block is None:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, GROUP, scales)
    else:
        out = _dequantize_and_multiply(x, packed, scales, block)
    if bias is not None:
        return out[:, :n] + bias
    return out if out.shape[1] == n else out[:, :n].contiguous()


def _dequantize_and_multiply(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, block: int
) -> torch.Tensor:
    m, k = x.shape
    n, half, groups = scales.shape[1], block // 2, k // GROUP
    tiles = packed.view(n // block, groups, GROUP, half)  # bytes
    given = x.dtype
    if not cpu_w8a16.multiplies_bf16():  # torch's product is many times as slow then
        x, scales = x.float(), scales.float()
    # [B, G, 1, block], contiguous: a strided operand would take the slow way through torch
    scale = scales[..., 0].reshape(groups, n // block, 1, block).transpose(0, 1).contiguous()
    step = max(1, SCRATCH // (k * block))  # blocks at a time
    scratch = x.new_empty(step, groups, GROUP, block)
    out = x.new_empty(m, n)
    for start in range(0, len(tiles), step):
        tile = tiles[start : start + step]
        weight = scratch[: len(tile)]
        for nibble, columns in ((tile & 15, slice(half)), (tile >> 4, slice(half, block))):
            code = nibble.view(torch.int8).sub_(8).to(x.dtype)
            torch.mul(code, scale[start : start + step, ..., columns], out=weight[..., columns])
        for i in range(len(tile)):
            column = (start + i) * block
            out[:, column : column + block] = x @ weight[i].view(k, block)
    return out.to(given)


def linear(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N]."""
    if "weight" in prepared:
        return F.linear(x, prepared["weight"], bias)
    return torch.ops.qig.cpu_w3a16(x, prepared["packed"], prepared["scales"], bias, n)


def describe(n: int, dtype: torch.dtype) -> str:
    """What runs a linear of n rows, in words."""
    if dtype == torch.float32:
        return "fp32 reference"
    return "torch int4 GEMM; torch GEMM on dequantized tiles for many rows"


define(
    "cpu_w3a16(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int n) -> Tensor",
    _linear,
    lambda x, packed, scales, bias, n: x.new_empty(x.shape[0], n),
)
