"""What the kernels of quantize_activation.py are made of: a token's row, and its integers.

      row makers                          epilogues
      normalized   RMSNorm (+ residual)   store_codes
      gated        act(gate) * up         store_halves
      a plain load                        store_row  16 bits again, for what does not quantize

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

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

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

ACTIVATIONS = ("silu", "gelu_tanh")
"""Of a gated MLP, by vLLM's names."""


@triton.jit
def begin(PDL: tl.constexpr):
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
def normalized(
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
    begin(PDL)
    h = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(added_ptr + token * K + columns, h.to(DTYPE), mask=inside)
    h *= tl.math.rsqrt(tl.sum(h * h, axis=0) / K.to(tl.float32) + eps)
    if not EARLY:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    return (h * weight.to(tl.float32)).to(DTYPE)


@triton.jit
def gated(gate_up_ptr, token, columns, K, ACTIVATION: tl.constexpr, PDL: tl.constexpr):
    """act(gate) * up of a token's row [gate, up]: [BLOCK_K] of its dtype."""
    inside = columns < K
    row = gate_up_ptr + token * (2 * K) + columns
    begin(PDL)
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
def largest(x, axis: tl.constexpr):
    """Largest magnitude of 16-bit floats along an axis, as the bits of an fp32."""
    bits = tl.max((x.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32), axis=axis)
    return bits.to(tl.int16).to(x.dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def store_codes(row, bits, columns, token, codes_ptr, scale_ptr, K, FIRST, PAD: tl.constexpr):
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
def store_halves(
    row, columns, token, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, ORDER: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """row [BLOCK_K], zero beyond K -> both halves, and a token's words of scale and sum."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    x = row.reshape(GROUPS, GROUP)
    bits = largest(x, 1)
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
def store_row(row, columns, token, out_ptr, K):
    tl.store(out_ptr + token * K + columns, row, mask=columns < K)
