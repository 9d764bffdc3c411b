"""Activations to integers in one pass over x, alone or fused with the RMSNorm or SiLU before.

    codes    int8, one scale per token: what w4a8 multiplies.
    halves   16-bit fixed point, one power of two a (token, group of 128): what w3a16 multiplies on
             int8 tensor cores, as two int8 halves.

      row makers                          epilogues
      _normalized  RMSNorm (+ residual)   _store_codes
      _gated       act(gate) * up         _store_halves
      a plain load                        _store_row  16 bits again, for what does not quantize

A kernel is one of each. act is SiLU, by which kernels are named, or for experts one of ACTIVATIONS.
Without a scale over the whole row (halves of x or of SiLU * up) a program
has 1,024 columns of a token, so that one token keeps many multiprocessors busy; otherwise a program
holds the token's row in registers. Codes of SiLU * up, whose rows are long, take two kernels of
chunks: the first leaves each chunk's largest magnitude, the second has them all before it scales
(H200, K=18944: a program a row took 6.3 us for one token and 408 for 8,192, where SiLU * up and
quantizing apart took 3.2 and 339).

Codes. scale = largest / 127 and inverse = 1 / scale, once per row; a code is x * inverse rounded
half to even, and rounded once. One fused multiply-add does it, because fp32 numbers near 1.5 *
2^23 lie one apart:

    x * inverse + 1.5 * 2^23 = 0 10010110 1qqqqqqqqqqqqqqqqqqqqqq      (sign, exponent, mantissa)
    as an integer            = 0x4B400000 + q, so the low byte is q as int8

A division an element, which packing.quantize_activation has, took 2.5 times as long (H200: 466 us
against 179 at M=8192, K=18944). The two differ at ties, where x / scale is a half but for fp32's
last bits, of which packing rounds the quotient once more: 6 codes of 10,000 in bf16, 1 in fp16.

Halves. scale = the smallest power of two with largest / scale <= 32639 (at least 2^-123), so x /
scale is exact but for the rounding to q, and an element within 2^6 of its group's largest (bf16;
2^3 for fp16) is not rounded at all:

    q = 256 * hi + lo,   lo = low byte of q as int8,   hi = (q + 128) >> 8
    32639 = 0x7F7F is the largest q whose hi, 127, is still an int8

The power of two is found in the bits, rounding the exponent up:

    (bits(largest * fp32(1 / 32639)) + 0x007FFFFF) & 0x7F800000

The product may be an ulp or two (2^-23) off, which never decides: the 16-bit float nearest to 32639
times a power of two is 32640 times it, 2^-15 away.

The exponent of scale / 8 and minus the sum of q, |sum| <= 128 * 32639 < 2^22, share a word of 32
bits (halves.py reads it), and the two words of a pair of groups lie side by side. Inputs are
stored in the order in which the tensor cores take them (layout.ORDERS).

Where 128 does not divide K, PAD zeros complete the last group of codes and halves: K + PAD is what
the kernels that multiply take for K. Zeros move no scale, and weights are padded as well.

A NaN or an infinity makes its row's scale NaN, or its group's infinite, and the codes zero: 0 / 0
or 0 * infinity reaches the output as NaN, and no integer is undefined. Magnitudes are compared as
integers, since a maximum of floats loses NaN; of the 16-bit floats, so that a row waits for its
maximum in 16 bits per element. Zeros get scale 1 (codes) or 2^-123 (halves).

Roundings are those of vLLM's unfused modules when vLLM compiles. Both take every step in fp32 and
round to 16 bits once, when the result is stored, and RMSNorm sees the sum with the residual before
that sum is rounded:

- vllm/ir/ops/layernorm.py rounds before the weight, and F.silu before the product, as written. But
  on CUDA the IR op's `native` implementation is lowered into Inductor's graph (platforms/cuda.py,
  get_default_ir_op_priority), and Inductor computes bf16 and fp16 in fp32 and leaves out the
  down-casts between fused operations (torch/_inductor/config.py, emulate_precision_casts = False).
- csrc/libtorch_stable/layernorm_kernels.cu, which runs without compilation, rounds once too, as
  `x * s_variance * w`, though of the rounded sum (csrc/layernorm_kernels.cu of older releases also
  before the weight); activation_kernels.cu rounds SiLU, then the product.

What may still differ is fp32's last bit, by the order in which squares are added.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from qig_serve.kernels import launch, layout
from qig_serve.kernels.launch import Kernel
from qig_serve.kernels.tiles import Tile

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23
ROUND_BITS = tl.constexpr(0x4B400000)
INFINITY = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
"""Not a float: Triton compares what a kernel uses with what it was, and NaN never equals NaN."""
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

GROUP = tl.constexpr(128)
LARGEST_HALVES = tl.constexpr(32639)
SMALLEST_UNIT_BITS = tl.constexpr(4 << 23)  # 2^-123
EIGHT_BITS = tl.constexpr(3 << 23)
"""What division by 8 takes off the bits of a float: the weights' codes come as 8 * code."""

MAX_K = 65536
"""Longest row that a program's registers hold: 64 KiB an array at 32 warps."""
MANY_TOKENS = 512
"""From here on programs hide one another's waits, and fewer warps a row do."""
CHUNK = 1024
"""Columns a program of the kernels that need no scale of a whole row."""
ACTIVATIONS = ("silu", "gelu_tanh")
"""Of a gated MLP, by vLLM's names."""


@triton.jit
def _begin(PDL: tl.constexpr):
    """Programmatic dependent launch: let the next kernel start, then wait for the one before.

    Whatever precedes the call must not read what an earlier kernel wrote.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _expf(x):
    """As Inductor has it: accurate to an ulp, not tl.exp's faster exponential."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _normalized(
    x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of a token's row (+ residual): [BLOCK_K] of x's dtype.

    x + residual goes to added_ptr, rounded; what is normalized is the sum before.
    """
    inside = columns < K
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EARLY: tl.constexpr = columns.shape[0] <= 8192  # of a longer row it would cost spills
    if EARLY:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    _begin(PDL)
    h = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(added_ptr + token * K + columns, h.to(DTYPE), mask=inside)
    h *= tl.math.rsqrt(tl.sum(h * h, axis=0) / K.to(tl.float32) + eps)
    if not EARLY:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    return (h * weight.to(tl.float32)).to(DTYPE)


@triton.jit
def _gated(gate_up_ptr, token, columns, K, ACTIVATION: tl.constexpr, PDL: tl.constexpr):
    """act(gate) * up of a token's row [gate, up]: [BLOCK_K] of its dtype."""
    inside = columns < K
    row = gate_up_ptr + token * (2 * K) + columns
    _begin(PDL)
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + K, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu_tanh":
        # gate / 2 * (1 + tanh(z / 2)) = gate / (1 + exp(-z)), z = sqrt(8 / pi) (gate + c gate^3)
        z = gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate)
    else:
        tl.static_assert(ACTIVATION == "silu")
        z = gate
    return (gate / (1.0 + _expf(-z)) * up).to(gate_up_ptr.dtype.element_ty)


@triton.jit
def _largest(x, axis: tl.constexpr):
    """Largest magnitude of 16-bit floats along an axis, as the bits of an fp32."""
    bits = tl.max((x.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32), axis=axis)
    return bits.to(tl.int16).to(x.dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _store_codes(row, bits, columns, token, codes_ptr, scale_ptr, K, FIRST, PAD: tl.constexpr):
    """row, zero beyond K, with the token's largest magnitude -> codes and, if FIRST, the scale."""
    finite = bits < INFINITY
    # Below 2^-126 the inverse would be infinite.
    scale = tl.maximum(bits.to(tl.float32, bitcast=True) * (1 / 127), SMALLEST_NORMAL)
    scale = tl.where(bits > 0, scale, 1.0)
    rounded = tl.fma(row.to(tl.float32), tl.div_rn(1.0, scale), ROUND).to(tl.int32, bitcast=True)
    codes = tl.where(finite, rounded, 0).to(tl.int8)
    tl.store(codes_ptr + token * (K + PAD) + columns, codes, mask=columns < K + PAD)
    stored = tl.where(finite, scale.to(tl.int32, bitcast=True), NAN_BITS)
    if FIRST:
        tl.store(scale_ptr + token, stored.to(tl.float32, bitcast=True))


@triton.jit
def _in_order(x, SIZE: tl.constexpr, ORDER: tl.constexpr):
    """x [SIZE] in the order of layout.ORDERS[ORDER]."""
    if ORDER == 4:
        return x.reshape(SIZE // 4, 2, 2).permute(0, 2, 1).reshape(SIZE)
    elif ORDER == 8:
        return x.reshape(SIZE // 32, 2, 2, 4, 2).permute(0, 3, 1, 4, 2).reshape(SIZE)
    elif ORDER == 16:
        return x.reshape(SIZE // 16, 2, 4, 2).permute(0, 2, 3, 1).reshape(SIZE)
    else:
        return x.reshape(SIZE // 32, 4, 2, 2, 2).permute(0, 2, 1, 4, 3).reshape(SIZE)


@triton.jit
def _store_halves(
    row, columns, token, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, ORDER: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """row [BLOCK_K], zero beyond K -> both halves, and a token's words of scale and sum."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    x = row.reshape(GROUPS, GROUP)
    bits = _largest(x, 1)
    finite = bits < INFINITY
    scaled = (bits.to(tl.float32, bitcast=True) * (1 / LARGEST_HALVES)).to(tl.int32, bitcast=True)
    scale = tl.maximum((scaled + 0x007FFFFF) & INFINITY, SMALLEST_UNIT_BITS)
    inverse = (0x7F000000 - scale).to(tl.float32, bitcast=True)  # exponents add up to 254
    q = tl.fma(x.to(tl.float32), inverse[:, None], ROUND).to(tl.int32, bitcast=True) - ROUND_BITS
    q = tl.where(finite[:, None], q, 0)

    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    words = tl.where(finite, scale - EIGHT_BITS, INFINITY) | (-tl.sum(q, axis=1) & 0x007FFFFF)
    where = x_scale_sum_ptr + (groups // 2 * M + token) * 2 + groups % 2
    pairs = tl.cdiv(K, 2 * GROUP)  # of an odd number of groups the last is half zeros
    tl.store(where, words, mask=groups < 2 * pairs)

    q = _in_order(q.reshape(BLOCK_K), BLOCK_K, ORDER)
    ptrs = halves_ptr + token * (2 * (K + PAD)) + columns
    tl.store(ptrs, ((q + 128) >> 8).to(tl.int8), mask=columns < K + PAD)
    tl.store(ptrs + (K + PAD), q.to(tl.int8), mask=columns < K + PAD)


@triton.jit
def _store_row(row, columns, token, out_ptr, K):
    tl.store(out_ptr + token * K + columns, row, mask=columns < K)


@triton.jit
def _columns(BLOCK_K: tl.constexpr):
    """A program's token and its columns of the row."""
    return tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    _begin(PDL)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    _store_codes(x, _largest(x, 0), columns, token, codes_ptr, scale_ptr, K, True, PAD)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, codes_ptr, scale_ptr, added_ptr, K, eps,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = _normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    _store_codes(row, _largest(row, 0), columns, token, codes_ptr, scale_ptr, K, True, PAD)


@triton.jit
def silu_mul_largest_kernel(
    gate_up_ptr, out_ptr, largest_ptr, K,
    BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    """A chunk of act(gate) * up in 16 bits, and its largest magnitude: int32 [M, chunks]."""
    token, columns = _columns(BLOCK_K)
    row = _gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    _store_row(row, columns, token, out_ptr, K)
    tl.store(largest_ptr + token * tl.num_programs(1) + tl.program_id(1), _largest(row, 0))


@triton.jit
def quantize_chunk_kernel(
    x_ptr, largest_ptr, codes_ptr, scale_ptr, K,
    CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """A chunk of x to codes, by the largest magnitudes of its token's chunks (CHUNKS or fewer)."""
    token, columns = _columns(BLOCK_K)
    chunk = tl.arange(0, CHUNKS)
    count = tl.num_programs(1)
    _begin(PDL)
    bits = tl.max(tl.load(largest_ptr + token * count + chunk, mask=chunk < count, other=0), axis=0)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    first = tl.program_id(1) == 0
    _store_codes(x, bits, columns, token, codes_ptr, scale_ptr, K, first, PAD)


@triton.jit(do_not_specialize=["M"])
def split_halves_kernel(
    x_ptr, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    _begin(PDL)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    _store_halves(x, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit(do_not_specialize=["M"])
def rms_norm_halves_kernel(
    x_ptr, residual_ptr, weight_ptr, halves_ptr, x_scale_sum_ptr, added_ptr, M, K, eps,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = _normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    _store_halves(row, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit(do_not_specialize=["M"])
def silu_mul_halves_kernel(
    gate_up_ptr, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr,
    ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = _gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    _store_halves(row, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, added_ptr, K, eps,
    BLOCK_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = _normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    _store_row(row, columns, token, out_ptr, K)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr, out_ptr, K,
    BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = _gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    _store_row(row, columns, token, out_ptr, K)


def row_options(k: int, m: int = 1) -> dict[str, int]:
    """BLOCK_K and compiler options of a kernel whose programs hold a row of K.

    The order in which RMSNorm adds squares follows from the warps: its kernels take those of m = 1
    for every M, so that a token's numbers do not depend on how many others there are.
    """
    if k > MAX_K:
        raise ValueError(f"activation rows of {k} are longer than {MAX_K}")
    block_k = max(256, triton.next_power_of_2(k))
    a_warp = 512 if m < MANY_TOKENS else 1024
    most = 16 if block_k <= 32768 else 32
    warps = min(most, max(4, block_k // a_warp))
    return {"BLOCK_K": block_k, "num_warps": warps, **launch.FUSED}


def chunk_options() -> dict[str, int]:
    """The same where programs hold CHUNK columns: 8 per thread, 16 bytes."""
    return {"BLOCK_K": CHUNK, "num_warps": CHUNK // 256, **launch.FUSED}


Codes = tuple[torch.Tensor, torch.Tensor]
"""codes int8 [M, K in whole groups], scale fp32 [M]."""
Halves = tuple[torch.Tensor, torch.Tensor]
"""halves int8 [M, 2, K in whole groups], x_scale_sum int32 [pairs, M, 2]: as split_halves' in
reference.py."""


def empty_codes(x: torch.Tensor, k: int) -> Codes:
    """Unwritten, for the tokens of x."""
    m = x.shape[0]
    return (
        torch.empty(m, layout.padded_inputs(k), dtype=torch.int8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
    )


def empty_halves(x: torch.Tensor, k: int) -> Halves:
    """Unwritten, for the tokens of x."""
    m = x.shape[0]
    return (
        torch.empty(m, 2, layout.padded_inputs(k), dtype=torch.int8, device=x.device),
        torch.empty(layout.padded_pairs(k), m, 2, dtype=torch.int32, device=x.device),
    )


def _order(x: torch.Tensor, tile: Tile | None) -> int:
    """Of halves for a tile; without one for those that use all of a program's warps."""
    orders = launch.orders(x.device)
    return orders.of_halves(tile) if tile else orders.activations


def _pad(k: int) -> dict[str, int]:
    """PAD of a row of K."""
    return {"PAD": layout.padded_inputs(k) - k}


def _chunks(m: int, k: int) -> tuple[int, int]:
    return m, triton.cdiv(k, CHUNK)


def quantize(x: torch.Tensor) -> Codes:
    """x [M, K] contiguous -> codes int8 [M, K], scale fp32 [M]."""
    m, k = x.shape
    codes, scale = empty_codes(x, k)
    if m:
        quantize_kernel[(m,)](
            x, codes, scale, k, **row_options(k, m), **_pad(k), **launch.early(x.device)
        )
    return codes, scale


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K], then `quantize`: codes, scale, x + residual (or x)."""
    m, k = x.shape
    codes, scale = empty_codes(x, k)
    added = x if residual is None else torch.empty_like(x)
    if m:
        rms_norm_quantize_kernel[(m,)](
            x, residual, weight, codes, scale, added, k, eps,
            HAS_RESIDUAL=residual is not None, **row_options(k), **_pad(k),
            **launch.early(x.device),
        )  # fmt: skip
    return codes, scale, added


def silu_mul_quantize(gate_up: torch.Tensor, activation: str = "silu") -> Codes:
    """act(gate) * up of [M, 2 K], then `quantize`: codes int8 [M, K], scale fp32 [M]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scale = empty_codes(gate_up, k)
    if m:
        grid, options = _chunks(m, k), {**chunk_options(), **launch.early(gate_up.device)}
        out = torch.empty(m, k, dtype=gate_up.dtype, device=gate_up.device)
        largest = torch.empty(grid, dtype=torch.int32, device=gate_up.device)
        silu_mul_largest_kernel[grid](gate_up, out, largest, k, ACTIVATION=activation, **options)
        quantize_chunk_kernel[grid](
            out, largest, codes, scale, k,
            CHUNKS=triton.next_power_of_2(grid[1]), **options, **_pad(k),
        )  # fmt: skip
    return codes, scale


def split_halves(x: torch.Tensor, tile: Tile | None = None) -> Halves:
    """x [M, K] contiguous, 32 dividing K -> halves and x_scale_sum (reference.split_halves).

    tile: of the product that takes them.
    """
    m, k = x.shape
    halves, x_scale_sum = empty_halves(x, k)
    if m:
        split_halves_kernel[_chunks(m, k)](
            x, halves, x_scale_sum, m, k,
            ORDER=_order(x, tile), **chunk_options(), **_pad(k), **launch.early(x.device),
        )  # fmt: skip
    return halves, x_scale_sum


def rms_norm_halves(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K], then `split_halves`, and x + residual (or x)."""
    m, k = x.shape
    halves, x_scale_sum = empty_halves(x, k)
    added = x if residual is None else torch.empty_like(x)
    if m:
        rms_norm_halves_kernel[(m,)](
            x, residual, weight, halves, x_scale_sum, added, m, k, eps, ORDER=_order(x, tile),
            HAS_RESIDUAL=residual is not None, **row_options(k), **_pad(k),
            **launch.early(x.device),
        )  # fmt: skip
    return halves, x_scale_sum, added


def silu_mul_halves(
    gate_up: torch.Tensor, tile: Tile | None = None, activation: str = "silu"
) -> Halves:
    """act(gate) * up of [M, 2 K], then `split_halves`."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    halves, x_scale_sum = empty_halves(gate_up, k)
    if m:
        silu_mul_halves_kernel[_chunks(m, k)](
            gate_up, halves, x_scale_sum, m, k,
            ORDER=_order(gate_up, tile), ACTIVATION=activation, **chunk_options(), **_pad(k),
            **launch.early(gate_up.device),
        )  # fmt: skip
    return halves, x_scale_sum


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K] in its dtype, and x + residual (or x)."""
    m, k = x.shape
    out = torch.empty_like(x)
    added = x if residual is None else torch.empty_like(x)
    if m:
        rms_norm_kernel[(m,)](
            x, residual, weight, out, added, k, eps,
            HAS_RESIDUAL=residual is not None, **row_options(k), **launch.early(x.device),
        )  # fmt: skip
    return out, added


def silu_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up of [M, 2 K] in its dtype: [M, K]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(m, k, dtype=gate_up.dtype, device=gate_up.device)
    if m:
        silu_mul_kernel[_chunks(m, k)](
            gate_up, out, k,
            ACTIVATION=activation, **chunk_options(), **launch.early(gate_up.device),
        )  # fmt: skip
    return out


ROWS = (3584, 18944)
"""The shortest and the longest row of tiles.LAYER_SHAPES."""


def kernels(dtype: str, order: int) -> list[Kernel]:
    """What launches on ROWS compile, for `dtype` ("bf16", "fp16") and an order of inputs."""
    x = f"*{dtype}"
    types = {
        "x_ptr": x, "residual_ptr": x, "weight_ptr": x, "added_ptr": x, "gate_up_ptr": x,
        "out_ptr": x, "codes_ptr": "*i8", "halves_ptr": "*i8", "scale_ptr": "*fp32",
        "x_scale_sum_ptr": "*i32", "largest_ptr": "*i32", "M": "i32", "K": "i32", "eps": "fp32",
    }  # fmt: skip
    found = []
    for function in (
        quantize_kernel, rms_norm_quantize_kernel, silu_mul_largest_kernel, quantize_chunk_kernel,
        split_halves_kernel, rms_norm_halves_kernel, silu_mul_halves_kernel, rms_norm_kernel,
        silu_mul_kernel,
    ):  # fmt: skip
        names = function.arg_names
        normalizes, chunks = "eps" in names, "largest_ptr" in names
        whole = normalizes or ("codes_ptr" in names and not chunks)
        variants = (
            [row_options(k, m) for k in ROWS for m in ((1,) if normalizes else (1, MANY_TOKENS))]
            if whole
            else [chunk_options()]
        )
        known: dict[str, Any] = {"HAS_RESIDUAL": True, "ORDER": order, "CHUNKS": 32, "PAD": 0}
        activations = ACTIVATIONS if "ACTIVATION" in names else ("",)
        unlike = {tuple(v.items()): v for v in variants}.values()
        for options, activation in itertools.product(unlike, activations):
            known["ACTIVATION"] = activation
            constants = {name: value for name, value in known.items() if name in names}
            constants["BLOCK_K"] = options["BLOCK_K"]
            arguments = {name: types[name] for name in names if name in types}
            compiler = {"num_warps": options["num_warps"], **launch.FUSED}
            found.append(
                Kernel(function, arguments, constants, compiler, inputs=options["BLOCK_K"])
            )
    return found
