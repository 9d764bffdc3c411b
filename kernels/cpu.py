"""The CPU path, on kernels that torch and vLLM ship: nothing is compiled on the user's machine.

What `prepare` keeps of a linear [N, K], and what then runs:

    w3a16  bf16, fp16   4.25 bits per weight. `packed`, uint8 in torch's int4 layout, holds
                        code - zero + 8; `scales` [groups, N, 2] a scale and a zero offset.
                        Few rows: torch's int4 GEMM. Many: dequantized a few columns at a time
                        into a scratch that stays in cache, then torch's GEMM.
    w4a8   bf16         4.27 bits per weight. `packed`, uint8 in vLLM's int4 layout, with `zeros`,
                        `scales` and `compensation`. Few rows: vLLM's int4 GEMM with int8
                        activations, four rows a call. Many: widened to int8 a few columns at a
                        time into scratch, then vLLM's int8 GEMM. Both want AVX-512 VNNI.
    w4a8   otherwise    8 bits per weight: `codes` int8 [N, K] and `scale`; torch's int8 GEMM.
    both   fp32         the reference: fp32 weights (w3a16) or int8 codes (w4a8), plain arithmetic.
    w8a16               the vocabulary's tables: cpu_w8a16.py.

Where 128 does not divide K, the weights of bf16 and fp16 are padded to whole groups with zeros, and
so is x in each call.

A 3-bit code minus its zero point lies in -7..7, so four bits hold it without a zero point and
nothing is rounded twice. All w4a8 kernels quantize activations as packing.quantize_activation
does and sum integers exactly.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qig_serve.formats import QuantScheme, unsupported_shape
from qig_serve.kernels import cpu_w8a16
from qig_serve.packing import dequantize, quantize_activation, unpack

GROUP = 128

# Rows from which unpacking first wins: tests/benchmarks/bench_cpu.py, AVX-512.
W3A16_MANY_ROWS = 48
W4A8_MANY_ROWS = 64
W3A16_SCRATCH = 1 << 20  # weights dequantized at a time: 2 MiB, about a core's L2
W4A8_SCRATCH = 1 << 22  # weights widened at a time: 4 MiB; every call quantizes x again
INT4_ROWS = 4  # rows a call of vLLM's int4 GEMM: one more takes twice as long

_N_BLOCK = 64  # torch's int4 layout has blocks of 64 output channels, padded here if need be
_VLLM_BLOCK = 32  # output channels a block of vLLM's layouts
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP32_EXACT = 1 << 24  # integers below this are exact in fp32

Prepared = dict[str, torch.Tensor]


def can_implement(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device_capability: tuple[int, int] | None = None,
) -> tuple[bool, str]:
    """Whether a linear [n, k] can run in the scheme with activations of `dtype`, or why not."""
    if scheme.name not in PATHS:
        return False, f"no CPU kernel for scheme {scheme.name}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"activations must be bfloat16, float16 or float32, not {dtype}"
    if reason := unsupported_shape(scheme, n, k):
        return False, reason
    return True, ""


def kernel_name(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype) -> str:
    """What runs a linear [n, k], in words."""
    reference = dtype == torch.float32 and scheme.name != "w8a16"
    return "fp32 reference" if reference else PATHS[scheme.name].describe(n, dtype)


def prepare(scheme: QuantScheme, tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) as the kernels want them.

    dtype: of the activations. See the head of this file for what is kept. ValueError if no kernel
    can run it.
    """
    codes = unpack(tensors["weight_packed"], scheme.bits, scheme.symmetric)  # [N, K]
    n, k = codes.shape
    possible, reason = can_implement(scheme, n, k, dtype)
    if not possible:
        raise ValueError(reason)
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    return PATHS[scheme.name].prepare(codes, scale, zero, dtype)


def linear(
    scheme: QuantScheme,
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times the prepared weight [N, K] transposed, plus bias [N]: [..., N]."""
    flat = x.reshape(-1, k)
    p = prepared
    if "rows" in p:
        out = torch.ops.qig.cpu_w8a16(flat, p["rows"], p["power"], p["rest"], bias)
    elif "weight" in p:
        out = F.linear(flat, p["weight"], bias)
    elif "codes" in p:
        out = torch.ops.qig.cpu_w4a8_codes(flat, p["codes"], p["scale"], bias)
    elif "compensation" in p:
        out = torch.ops.qig.cpu_w4a8(
            flat, p["packed"], p["zeros"], p["scales"], p["compensation"], bias
        )
    else:
        out = torch.ops.qig.cpu_w3a16(flat, p["packed"], p["scales"], bias, n)
    return out.reshape(*x.shape[:-1], n)


def embedding(
    scheme: QuantScheme, ids: torch.Tensor, prepared: Prepared, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `ids` [...] of the prepared table [N, K] in `dtype`: [..., K]."""
    return cpu_w8a16.embedding(ids, prepared, dtype)


def compile_ahead(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool = False,
) -> None:
    """Nothing is compiled on a CPU."""


def warm_up(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool = False,
) -> None:
    """Nothing to compile; finds out once what this processor offers."""
    PATHS[scheme.name].look_up()


# ---- w3a16


@functools.cache
def _torch_int4_block() -> int | None:
    """Output channels a block of torch's int4 layout, or None if it is not one read here.

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


def _prepare_w3a16(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> Prepared:
    (n, k), groups = codes.shape, scale.shape[1]
    padding = -n % _N_BLOCK
    shift = 8 - zero.to(torch.int32).repeat_interleave(GROUP, dim=1)[:, :k]
    nibbles = codes.to(torch.int32) + shift  # [N, K]
    nibbles = F.pad(nibbles, (0, groups * GROUP - k, 0, padding), value=8)
    scales = torch.zeros(groups, n + padding, 2, dtype=dtype)
    scales[:, :n, 0] = scale.t()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    return {"packed": packed, "scales": scales}


def _w3a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    """x [M, K], packed and scales as `_prepare_w3a16` made them: [M, N] in x's dtype."""
    block, x = _torch_int4_block(), _whole_groups(x)
    if x.shape[0] < W3A16_MANY_ROWS or block is None:
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
    step = max(1, W3A16_SCRATCH // (k * block))  # blocks at a time
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


# ---- w4a8


@functools.cache
def _vllm_kernels() -> bool:
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
    p = _prepare_w4a8(codes, torch.ones(64, 1))
    wide = _widen(p["packed"], p["compensation"], torch.empty(2, 32 * 260, dtype=torch.int8))
    return torch.equal(wide.view(64, 260), torch.ops._C.convert_weight_packed(codes))


def _whole_groups(rows: torch.Tensor) -> torch.Tensor:
    """[R, K] with zeros behind a last group that is shorter."""
    missing = -rows.shape[1] % GROUP
    return F.pad(rows, (0, missing)) if missing else rows


def _use_vllm(n: int, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and n % _VLLM_BLOCK == 0 and _vllm_kernels()


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [K, N] -> int32 [K, N / 8] in AWQ's nibble order."""
    fields = codes.to(torch.int32).reshape(codes.shape[0], -1, 8)[..., _AWQ_ORDER]
    words = torch.zeros(fields.shape[:2], dtype=torch.int32)
    for i in range(8):
        words |= fields[..., i] << (4 * i)
    return words


def _prepare_w4a8(codes: torch.Tensor, scale: torch.Tensor) -> Prepared:
    codes = _whole_groups(codes)
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


def _w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    compensation: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] bf16, the rest as `_prepare_w4a8` made it: [M, N] bf16."""
    x = _whole_groups(x).contiguous()
    m, k = x.shape
    n = scales.numel()
    bias = None if bias is None else bias.float()
    if m <= INT4_ROWS:
        return torch.ops._C.int4_scaled_mm_cpu(x, packed, zeros, scales, bias)
    out = x.new_empty(m, n)
    if m < W4A8_MANY_ROWS:
        for row in range(0, m, INT4_ROWS):
            rows = slice(row, row + INT4_ROWS)
            out[rows] = torch.ops._C.int4_scaled_mm_cpu(x[rows], packed, zeros, scales, bias)
        return out
    step = max(1, W4A8_SCRATCH // (k * _VLLM_BLOCK))  # blocks at a time
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


def _w4a8_codes(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] in any dtype, codes int8 [N, K]: the integer product is exact."""
    quantized, token_scale = quantize_activation(x)
    if x.dtype == torch.float32 and 127 * 8 * x.shape[1] < _FP32_EXACT:
        product = quantized.float() @ codes.float().t()
    else:
        product = torch._int_mm(quantized, codes.t()).float()
    out = product * token_scale * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


# ---- registration

_library = torch.library.Library("qig", "FRAGMENT")


def _define(
    name: str, arguments: str, op: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> None:
    _library.define(f"{name}({arguments}) -> Tensor")
    _library.impl(name, op, "CPU")
    torch.library.register_fake(f"qig::{name}", fake, lib=_library)


_define(
    "cpu_w3a16",
    "Tensor x, Tensor packed, Tensor scales, Tensor? bias, int n",
    _w3a16,
    lambda x, packed, scales, bias, n: x.new_empty(x.shape[0], n),
)
_define(
    "cpu_w4a8",
    "Tensor x, Tensor packed, Tensor zeros, Tensor scales, Tensor compensation, Tensor? bias",
    _w4a8,
    lambda x, packed, zeros, scales, comp, bias: x.new_empty(x.shape[0], scales.numel()),
)
_define(
    "cpu_w4a8_codes",
    "Tensor x, Tensor codes, Tensor scale, Tensor? bias",
    _w4a8_codes,
    lambda x, codes, scale, bias: x.new_empty(x.shape[0], scale.shape[0]),
)


# ---- the schemes


@dataclass(frozen=True)
class CpuPath:
    """What a scheme needs on a CPU, beside the op of its prepared tensors (`linear`)."""

    describe: Callable[[int, torch.dtype], str]
    """(n, dtype) -> what runs it, in words."""
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], Prepared]
    """(codes [N, K], scale, zero point, dtype) -> the kernels' tensors."""
    look_up: Callable[[], object]
    """Finds out what the processor offers."""


def _describe_w3a16(n: int, dtype: torch.dtype) -> str:
    return "torch int4 GEMM; torch GEMM on dequantized tiles for many rows"


def _keep_w3a16(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> Prepared:
    if dtype == torch.float32 or zero is None:
        return {"weight": dequantize(codes, scale, zero)}
    return _prepare_w3a16(codes, scale, zero, dtype)


def _describe_w4a8(n: int, dtype: torch.dtype) -> str:
    if _use_vllm(n, dtype):
        return "vLLM int4 x int8 GEMM; vLLM int8 GEMM on widened tiles for many rows"
    return "torch int8 GEMM"


def _keep_w4a8(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> Prepared:
    n = codes.shape[0]
    if _use_vllm(n, dtype):
        return _prepare_w4a8(codes, scale.float())
    return {"codes": codes, "scale": scale.float().reshape(n).contiguous()}


PATHS = {
    "w3a16": CpuPath(_describe_w3a16, _keep_w3a16, _torch_int4_block),
    "w4a8": CpuPath(_describe_w4a8, _keep_w4a8, _vllm_kernels),
    "w8a16": CpuPath(cpu_w8a16.describe, cpu_w8a16.keep, cpu_w8a16.multiplies_bf16),
}
