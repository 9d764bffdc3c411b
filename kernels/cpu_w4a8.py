"""w4a8 on a CPU: vLLM's integer GEMMs where the processor has AVX-512 VNNI, torch's elsewhere.

bf16, 4.27 bits per weight:

    packed        uint8 in vLLM's int4 layout, with `zeros` and `scales`
    compensation  of vLLM's int8 layout

    Few rows: vLLM's int4 GEMM with int8 activations, four rows per call. Many: widened to int8 a
    few columns at a time into scratch, then vLLM's int8 GEMM.

Otherwise, 8 bits per weight: `codes` int8 [N, K] and `scale` fp32 [N]; torch's int8 GEMM where the
processor has instructions for it. Elsewhere fp32, or for a few rows of bf16 torch's GEMM on int8
weights, in half the time and less, whose sums are rounded to bf16. All quantize activations as
packing.quantize_activation does, and but for those sum integers exactly.
"""

from __future__ import annotations

import functools
import importlib

import torch

from qig_serve.kernels.layout import GROUP, whole_groups
from qig_serve.kernels.library import Prepared, define
from qig_serve.packing import quantize_activation

# Rows from which unpacking first wins: tests/benchmarks/bench_cpu.py, AVX-512.
MANY_ROWS = 64
SCRATCH = 1 << 22  # weights widened at a time: 4 MiB; every call quantizes x again
FP32_SCRATCH = 1 << 20  # weights widened to fp32 at a time: 4 MiB
INT4_ROWS = 4  # rows per call of vLLM's int4 GEMM: one more takes twice as long

_FEW_ROWS = 8  # for which torch's GEMM on int8 weights is the faster one (AVX2)
_VLLM_BLOCK = 32  # output channels per block of vLLM's layouts
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP32_EXACT = 1 << 14  # products of 7 and 3 bits whose sum is exact in fp32


@functools.cache
def vllm_kernels() -> bool:
    """Whether vLLM's int4 and int8 GEMMs are there, run here, and lay weights out as read here.

    Asked before they are called: without AVX-512 VNNI they abort the process.
    """
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()):
        return False
    try:
        importlib.import_module("vllm._C")
    except ImportError:
        return False
    names = (
        "convert_weight_packed",
        "convert_weight_packed_scale_zp",
        "int4_scaled_mm_cpu",
        "int8_scaled_mm_with_quant",
    )
    if not all(hasattr(torch.ops._C, name) for name in names):
        return False
    codes = (torch.arange(64 * 256) * 7 // 3 % 16 - 8).to(torch.int8).reshape(64, 256)
    p = _prepare(codes, torch.ones(64, 1))
    wide = _widen(p["packed"], p["compensation"], torch.empty(2, 32 * 260, dtype=torch.int8))
    return torch.equal(wide.view(64, 260), torch.ops._C.convert_weight_packed(codes))


look_up = vllm_kernels


def _use_vllm(n: int, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and n % _VLLM_BLOCK == 0 and vllm_kernels()


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [K, N] -> int32 [K, N / 8] in AWQ's nibble order."""
    fields = codes.to(torch.int32).reshape(codes.shape[0], -1, 8)[..., _AWQ_ORDER]
    words = torch.zeros(fields.shape[:2], dtype=torch.int32)
    for i in range(8):
        words |= fields[..., i] << (4 * i)
    return words


def _prepare(codes: torch.Tensor, scale: torch.Tensor) -> Prepared:
    codes = whole_groups(codes)
    n, k = codes.shape
    packed, zeros, scales = torch.ops._C.convert_weight_packed_scale_zp(
        _awq_words(codes.t() + 8), _awq_words(torch.full((1, n), 8)), scale.reshape(1, n), 0
    )
    blocks = torch.ops._C.convert_weight_packed(codes).view(n // _VLLM_BLOCK, -1)
    return {
        "packed": packed,  # [N/32, K/128, 32*128/2 + 128]: nibbles, and their own compensation
        "zeros": zeros,
        "scales": scales,  # fp32 [N/32, 1, 32]
        "compensation": blocks[:, _VLLM_BLOCK * k :].clone(),  # the int8 GEMM's: int32 as bytes
    }


def _widen(packed: torch.Tensor, compensation: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Blocks of vLLM's int4 layout into its int8 layout: [B, 32 * (K + 4)] int8, in scratch.

    Both hold four consecutive inputs of each of 32 channels side by side; a run of 32 bytes has
    eight channels in its low nibbles and the next eight in its high ones.
    """
    blocks, groups = packed.shape[:2]
    nibbles = packed[:, :, : _VLLM_BLOCK * GROUP // 2].reshape(blocks, groups * 64, 32)
    codes = scratch[:, : groups * GROUP * _VLLM_BLOCK].view(blocks, groups * 64, 2, 32)
    codes[:, :, 0] = (nibbles & 15).view(torch.int8).sub_(8)
    codes[:, :, 1] = (nibbles >> 4).view(torch.int8).sub_(8)
    scratch[:, groups * GROUP * _VLLM_BLOCK :] = compensation
    return scratch


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    compensation: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] bf16, the rest as `_prepare` made it: [M, N] bf16."""
    x = whole_groups(x).contiguous()
    m, k = x.shape
    n = scales.numel()
    bias = None if bias is None else bias.float()
    if m <= INT4_ROWS:
        return torch.ops._C.int4_scaled_mm_cpu(x, packed, zeros, scales, bias)
    out = x.new_empty(m, n)
    if m < MANY_ROWS:
        for row in range(0, m, INT4_ROWS):
            rows = slice(row, row + INT4_ROWS)
            out[rows] = torch.ops._C.int4_scaled_mm_cpu(x[rows], packed, zeros, scales, bias)
        return out
    step = max(1, SCRATCH // (k * _VLLM_BLOCK))  # blocks at a time
    scratch = torch.empty(step, _VLLM_BLOCK * (k + 4), dtype=torch.int8)
    channel_scale = scales.view(n)
    for start in range(0, len(packed), step):
        tile = packed[start : start + step]
        wide = _widen(tile, compensation[start : start + step], scratch[: len(tile)])
        columns = slice(start * _VLLM_BLOCK, (start + len(tile)) * _VLLM_BLOCK)
        out[:, columns] = torch.ops._C.int8_scaled_mm_with_quant(
            x,
            wide.view(-1, k + 4),
            channel_scale[columns],
            None if bias is None else bias[columns],
            x.dtype,
            True,
        )
    return out


def _product(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """tokens int8 [M, K], codes int8 [N, K] of four bits: the exact product, fp32 [M, N].

    Without instructions for int8 products torch's takes 2 to 30 times as long as one in fp32, which
    is exact too while no sum reaches 2**24: a few codes at a time, and of a wide K a part.
    """
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(tokens, codes.t()).float()
    (m, k), n = tokens.shape, len(codes)
    total = torch.zeros(m, n, dtype=torch.int32)
    for start in range(0, k, _FP32_EXACT):
        part = slice(start, start + _FP32_EXACT)
        x, weight = tokens[:, part].float(), codes[:, part]
        step = max(1, FP32_SCRATCH // weight.shape[1])
        for row in range(0, n, step):
            rows = slice(row, row + step)
            total[:, rows] += (x @ weight[rows].float().t()).to(torch.int32)
    return total.float()


def _linear_of_codes(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] in any dtype, codes int8 [N, K], scale fp32 [N]: [M, N] in x's dtype."""
    tokens, token_scale = quantize_activation(x)
    if x.dtype == torch.bfloat16 and len(x) <= _FEW_ROWS and not torch.cpu._is_vnni_supported():
        one = torch.ones(len(codes), dtype=x.dtype)
        sums = torch.ops.aten._weight_int8pack_mm(tokens.to(x.dtype), codes, one).float()
    else:
        sums = _product(tokens, codes)
    out = sums * token_scale * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def describe(n: int, dtype: torch.dtype) -> str:
    """What runs a linear of n rows, in words."""
    if _use_vllm(n, dtype):
        return "vLLM int4 x int8 GEMM; vLLM int8 GEMM on widened tiles for many rows"
    if torch.cpu._is_vnni_supported():
        return "torch int8 GEMM"
    if dtype == torch.bfloat16:
        return "torch int8 weight-only GEMM; torch GEMM on widened codes for many rows"
    return "torch GEMM on widened codes"


def prepare(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> Prepared:
    """codes int8 [N, K], scale [N, 1] as at the head, for activations of `dtype`."""
    n = codes.shape[0]
    if _use_vllm(n, dtype):
        return _prepare(codes, scale.float())
    return {"codes": codes, "scale": scale.float().reshape(n).contiguous()}


def linear(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N]."""
    p = prepared
    if "codes" in p:
        return torch.ops.qig.cpu_w4a8_codes(x, p["codes"], p["scale"], bias)
    return torch.ops.qig.cpu_w4a8(x, p["packed"], p["zeros"], p["scales"], p["compensation"], bias)


define(
    "cpu_w4a8(Tensor x, Tensor packed, Tensor zeros, Tensor scales, Tensor compensation, "
    "Tensor? bias) -> Tensor",
    _linear,
    lambda x, packed, zeros, scales, comp, bias: x.new_empty(x.shape[0], scales.numel()),
)
define(
    "cpu_w4a8_codes(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    _linear_of_codes,
    lambda x, codes, scale, bias: x.new_empty(x.shape[0], scale.shape[0]),
)
