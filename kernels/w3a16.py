"""W3A16: x [M, K] (bf16, fp16) times a dense 3-bit weight [N, K] transposed, groups of 128 along K.

    out[m, n] = sum_g scale[n, g] * sum_{k in g} x[m, k] * (code[n, k] - zero[n, g])  (+ bias[n])

Read on in this order: halves.py, the kernel for few tokens, with the drawing of the bytes; then
here `half_group_ptx` (half a group's codes made numbers, in PTX) and its twin `_codes`,
`product_of_groups`, `_part`, `w3a16_shared_kernel`.

Checkpoint layout (formats.py): a row's codes w0, w1, ... are a stream of 3-bit fields, lowest bits
first; 32 of them are three int32 words, and w10 and w21 lie across two words.

    word 0                     word 1                    word 2
    w0 w1 ... w9 w10(2 bits)   w10(1) w11 ... w21(1)     w21(2) w22 ... w31

Kernel layout (layout.py): three byte planes of a group, drawn in halves.py; 24 bits hold 8
codes, nothing is padded. Scale and zero point of a (row, group) are the 32 bits of an fp32 number
whose last three are the zero point: 3.25 bits per weight in all.

From a field to a number, in one instruction: `(w & 7 << p) | magic`, a lop3, writes the field at
bits p..p+2 into the mantissa of a float that has nothing else there. In bf16, 0x4300 is 128 and
its last mantissa bit is worth 1, so p = 0 gives 128 + v; 0x4180 is 16 with a last bit worth 1/8,
so p = 3, without a shift, gives 16 + v. In general magic is 2^(b-p), b = 7 mantissa bits in bf16
and 10 in fp16. A register has four bytes: of bytes 0 and 2 that makes two numbers at once, and
after one shift by 8 of bytes 1 and 3. One packed addition takes 2^(b-p) + zero away, exactly, and
one packed multiplication scales: what reaches the tensor core is the weight, rounded once to 16
bits.

Operations for the 32 weights in the three registers of four byte positions:

    shifts by 8                                  8      0.25 per weight
    lop3: 16 fields, 2 to gather c3 and c7      18      0.56
    shifts to gather c3 and c7                   4      0.13
    packed additions, multiplications           32     (1.00, not on the integer pipe)

Why each regime has its shape (the numbers of tokens are data: tiles.json):

    halves, few       halves.py: bound by memory and issue slots, so integers stay integers.
    split_k, stream_k From 32 tokens on, halves' scaling of sums costs more than making numbers of
                      16 bits. An output has too few tiles for a GPU (14 to 36 in qkv, o, down at
                      128 tokens, for 132 SMs): work is divided in equal shares of K (sharing.py).
    prefill, many     The same product without the division: tiles suffice, and token tiles that
                      share weights run beside each other, for L2.
    dequantize, more  Weights into 16-bit scratch, then cuBLAS: the floor the fused prefill has to
                      beat. A large weight goes through the scratch in slices of rows.

A product is made of 64 inputs at a time, four slices of 16: so that 128 x 128 outputs (128
registers of a thread of four warps) and half a group of weights (32) fit without a spill, and two
programs fit an SM.

RAGGED: 128 does not divide K, and the row of x ends within the last group. What is read behind it
counts as zero; the weights are padded to whole groups (layout.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import (
    halves,
    launch,
    layout,
    library,
    quantize_activation,
    quantizer_ops,
    sharing,
)
from qig_serve.kernels.fused_linear import OfHalves, define_fused
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.library import Prepared
from qig_serve.kernels.tiles import Regime, Tile, select, tiles_of

MOST_HALVES = 64
"""Most tokens at which halves tiles are tried."""
FUSES_ACTIVATIONS = True
"""Whether vLLM's graphs are to put the norm or SiLU before a linear into its op."""

_MANTISSA = {"bf16": 7, "fp16": 10}
_BIAS = {"bf16": 127, "fp16": 15}
_AND_OR, _BLEND = 0xEA, 0xE4  # lop3: (a & b) | c, and c ? a : b bit by bit


@triton.constexpr_function
def _magic(float_type: str, p: int) -> int:
    """Bits of 2^(b - p), to which a field at bits p..p+2 adds its value."""
    b = _MANTISSA[float_type]
    return (b - p + _BIAS[float_type]) << b


@triton.constexpr_function
def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


@triton.constexpr_function
def _number(out: str, word: str, p: int, float_type: str) -> str:
    """PTX: out = ((field of word at p, in both halves) - zero) * scale."""
    two = f"{float_type.replace('fp', 'f')}x2"
    return f"""lop3.b32 {out}, {word}, {_twice(7 << p)}, {_twice(_magic(float_type, p))}, {_AND_OR};
    fma.rn.{two} {out}, {out}, one, minus_{p};
    fma.rn.{two} {out}, {out}, $12, minus_zero;"""


@triton.constexpr_function
def half_group_ptx(half: int, float_type: str) -> str:
    """PTX of half a group: c0..c3 (half 0) or c4..c7 of two pairs of bytes, which are two elements.

    $0-$7 out: of each code the even bytes' numbers, then the odd bytes'; $8 $9 $10 planes A, B, C;
    $11 zero points; $12 scales. Two elements to a register everywhere, and neither sees the other:
    which two come together is the compiler's choice.
    """
    one = _BIAS[float_type] << _MANTISSA[float_type]
    p = 3 * half
    lines = []
    for i in range(4):
        if i < 3:
            lines.append(f"mov.b32 t, ${8 + i};")
        else:  # c3 from planes A and C, c7 from B and C: gathered at bits 3-5
            lines.append(f"shr.u32 t, ${8 + half}, 3; shr.u32 u, $10, {1 + half};")
            lines.append(f"lop3.b32 t, t, u, 0x18181818, {_BLEND};")
            p = 3
        lines.append(_number(f"${2 * i}", "t", p, float_type))
        lines.append("shr.u32 t, t, 8;")
        lines.append(_number(f"${2 * i + 1}", "t", p, float_type))
    for q in sorted({3 * half, 3}):
        magic = _twice(0x8000 | _magic(float_type, q))
        lines.insert(0, f"mad.lo.u32 minus_{q}, $11, {1 << q}, {magic};")
    body = "\n".join(lines)
    return f"""{{ .reg .b32 t, u, one, minus_0, minus_3, minus_zero;
    mov.b32 one, {_twice(one)};
    mov.b32 minus_zero, {_twice(0x8000)};
    {body}
    }}"""


@triton.constexpr_function
def _float_type(dtype: tl.dtype) -> str:
    return dtype.name  # "bf16" or "fp16"


@triton.jit
def _codes(word, zero, scale, DTYPE: tl.constexpr):
    """Twin of _number: (word & 7 - zero) * scale, rounded once, as DTYPE's bits."""
    value = ((word & 7) - zero.to(tl.int32)).to(tl.float32)
    value = value * scale.to(DTYPE, bitcast=True).to(tl.float32)
    return value.to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def _four_slices(
    a, b, c, zero, scale, HALF: tl.constexpr, DTYPE: tl.constexpr, USE_PTX: tl.constexpr
):  # fmt: skip
    """Pairs of bytes of the planes, zero points and scales, all int16 [R, 8] -> numbers.

    DTYPE's bits, int16 [R, 8] each: of four slices the even bytes', and the odd bytes'.
    """
    if USE_PTX:
        ptx: tl.constexpr = half_group_ptx(HALF, _float_type(DTYPE))
        return tl.inline_asm_elementwise(
            ptx, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r", [a, b, c, zero, scale],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b, c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
        low = b if HALF else a
        gathered = (low >> 6) & 0x303 | (c >> (6 + HALF) & 0x101) << 2
        a, b, c = a >> 3 * HALF, b >> 3 * HALF, c >> 3 * HALF
        return (
            _codes(a, zero, scale, DTYPE), _codes(a >> 8, zero, scale, DTYPE),
            _codes(b, zero, scale, DTYPE), _codes(b >> 8, zero, scale, DTYPE),
            _codes(c, zero, scale, DTYPE), _codes(c >> 8, zero, scale, DTYPE),
            _codes(gathered, zero, scale, DTYPE), _codes(gathered >> 8, zero, scale, DTYPE),
        )  # fmt: skip


@triton.jit
def _in_order(e0, o0, e1, o1, e2, o2, e3, o3, R: tl.constexpr, ORDER: tl.constexpr):
    """Even and odd bytes of four slices, [R, 8] each -> [R, 64] in the order of k (layout.py).

    Names on a GPU, no instruction.
    """
    first = tl.join(tl.join(e0, o0), tl.join(e2, o2))  # [R, pair, odd, s / 2]
    second = tl.join(tl.join(e1, o1), tl.join(e3, o3))
    every = tl.join(first, second).reshape(R, 4, 2, 2, 2, 2)  # [.., odd, s / 2, s % 2]
    if ORDER == 16:
        ordered = every.permute(0, 4, 5, 3, 1, 2)
    else:
        ordered = every.permute(0, 4, 1, 5, 3, 2)
    return ordered.reshape(R, 64)


@triton.jit
def _half_group(
    a, b, c, scale_zero, HALF: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, 64] of DTYPE: planes int16 [BLOCK_N, 8], scale_zero int32 [BLOCK_N]."""
    zero = tl.broadcast_to((scale_zero & 7).to(tl.int16)[:, None], [BLOCK_N, 8])
    scale = (scale_zero & -8).to(tl.float32, bitcast=True).to(DTYPE).to(tl.int16, bitcast=True)
    scale = tl.broadcast_to(scale[:, None], [BLOCK_N, 8])
    e0, o0, e1, o1, e2, o2, e3, o3 = _four_slices(a, b, c, zero, scale, HALF, DTYPE, USE_PTX)
    return _in_order(e0, o0, e1, o1, e2, o2, e3, o3, BLOCK_N, ORDER).to(DTYPE, bitcast=True)


@triton.jit
def _load_x(ptrs, in_range, left, BLOCK_M: tl.constexpr, RAGGED: tl.constexpr):
    """x [64, BLOCK_M] at ptrs, of rows that have `left` more inputs: zeros behind them."""
    if RAGGED:
        return tl.load(ptrs, mask=in_range & (tl.arange(0, 64) < left)[:, None], other=0)
    else:
        return sharing.load_tokens(ptrs, in_range, BLOCK_M)


@triton.jit
def groups_of(K, RAGGED: tl.constexpr):
    """Groups of K inputs."""
    if RAGGED:
        return tl.cdiv(K, 128)
    else:
        return K // 128


@triton.jit
def product_of_groups(
    x_ptrs, x_in_range, weight_ptrs, scale_zero_ptrs, group_first, group_last, K, TILES,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, RAGGED: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """W x^T over groups: fp32 [BLOCK_N, BLOCK_M].

    x_ptrs [64, BLOCK_M] to the first inputs; weight_ptrs [BLOCK_N, 8] to plane A (int16) and
    scale_zero_ptrs [BLOCK_N] to the words of the first pair of groups.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in tl.range(group_first, group_last, num_stages=STAGES):
        planes = weight_ptrs + (group // 2 * (TILES * 6144) + group % 2 * 3072)
        a = tl.load(planes)
        b = tl.load(planes + 1024)
        c = tl.load(planes + 2048)
        scale_zero = tl.load(scale_zero_ptrs + (group // 2 * (TILES * 256) + group % 2))
        x = x_ptrs + group * 128
        left = K - group * 128
        x_first = _load_x(x, x_in_range, left, BLOCK_M, RAGGED)
        x_second = _load_x(x + 64, x_in_range, left - 64, BLOCK_M, RAGGED)
        w = _half_group(a, b, c, scale_zero, 0, BLOCK_N, ORDER, DTYPE, USE_PTX)
        acc = tl.dot(w, x_first, acc)
        w = _half_group(a, b, c, scale_zero, 1, BLOCK_N, ORDER, DTYPE, USE_PTX)
        acc = tl.dot(w, x_second, acc)
    return acc


@triton.jit
def pointers(
    x_ptr, weight_ptr, scale_zero_ptr, tile, tokens, M, K, TILES,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of an output tile: rows [BLOCK_N], and what `product_of_groups` takes of pointers.

    WIDE: x may have more than 2^31 elements.
    """
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = tl.minimum(rows, TILES * 128 - 1)  # a half-filled last tile stores not all it reads
    weight_ptrs = weight_ptr + (stored // 128 * 6144 + stored % 128 * 8)[:, None]
    rows_read = tl.minimum(tokens, M - 1)[None, :]
    if WIDE:
        rows_read = rows_read.to(tl.int64)
    x_ptrs = x_ptr + (rows_read * K + tl.arange(0, 64)[:, None])
    return rows, x_ptrs, weight_ptrs + tl.arange(0, 8)[None, :], scale_zero_ptr + stored * 2


@triton.jit
def _part(
    first, last, x_ptr, weight_ptr, scale_zero_ptr, bias_ptr, out_ptr, partials_ptr, counter_ptr,
    M, N, K, TILES, tiles_m, size, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Units from `first` to the end of its output tile, or to `last`; -> the unit after them."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    groups = groups_of(K, RAGGED)
    tile = first // groups
    start = first - tile * groups
    end = tl.minimum(groups, start + last - first)
    token = tile % tiles_m * BLOCK_M
    tokens = token + tl.arange(0, BLOCK_M)
    rows, x_ptrs, weight_ptrs, scale_zero_ptrs = pointers(
        x_ptr, weight_ptr, scale_zero_ptr, tile // tiles_m, tokens, M, K, TILES, BLOCK_N, False
    )
    acc = product_of_groups(
        x_ptrs, (tokens < M)[None, :], weight_ptrs, scale_zero_ptrs, start, end, K, TILES,
        BLOCK_M, BLOCK_N, STAGES, ORDER, DTYPE, RAGGED, USE_PTX,
    )  # fmt: skip
    if end - start == groups:
        sharing.store_out(out_ptr, acc, bias_ptr, rows, tokens, M, N, HAS_BIAS)
    else:
        here = tl.minimum(M - token, BLOCK_M)
        complete, one, other = sharing.leave_part(
            acc, partials_ptr, counter_ptr, tile, groups, size, rest, start == 0, here,
            BLOCK_M, BLOCK_N, ALIGNED,
        )  # fmt: skip
        if complete:
            for i in tl.range(0, here, 8):
                total = sharing.add_parts(partials_ptr, one, other, i, BLOCK_M, BLOCK_N, 8, ALIGNED)
                some = token + i + tl.arange(0, 8)
                sharing.store_out(out_ptr, total, bias_ptr, rows, some, M, N, HAS_BIAS)
    return first + end - start


@triton.jit(do_not_specialize=["M", "TILES", "tiles_m", "size", "rest"])
def w3a16_shared_kernel(
    x_ptr, weight_ptr, scale_zero_ptr, bias_ptr, out_ptr, partials_ptr, counter_ptr,
    M, N, K, TILES, tiles_m, size, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), each with an equal share of the units (tile, group)."""
    groups = groups_of(K, RAGGED)
    first, last = sharing.share(groups, size, rest, ALIGNED)
    if PDL:
        ahead = first % groups // 2 * TILES + first // groups // tiles_m * BLOCK_N // 128
        line = tl.minimum(ahead * 96 + tl.arange(0, 128), groups // 2 * TILES * 96 - 1)
        sharing.start_early(weight_ptr + line.to(tl.int64) * 64, PDL, FETCH)
    if ALIGNED:  # no share crosses a tile
        _part(
            first, last, x_ptr, weight_ptr, scale_zero_ptr, bias_ptr, out_ptr, partials_ptr,
            counter_ptr, M, N, K, TILES, tiles_m, size, rest,
            BLOCK_M, BLOCK_N, STAGES, ORDER, ALIGNED, HAS_BIAS, RAGGED, USE_PTX,
        )  # fmt: skip
    else:
        while first < last:
            first = _part(
                first, last, x_ptr, weight_ptr, scale_zero_ptr, bias_ptr, out_ptr, partials_ptr,
                counter_ptr, M, N, K, TILES, tiles_m, size, rest,
                BLOCK_M, BLOCK_N, STAGES, ORDER, ALIGNED, HAS_BIAS, RAGGED, USE_PTX,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "TILES"])
def w3a16_prefill_kernel(
    x_ptr, weight_ptr, scale_zero_ptr, bias_ptr, out_ptr, M, N, K, TILES,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GROUP_M: tl.constexpr,
    ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles,), GROUP_M token tiles beside each other for L2."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_n = tl.cdiv(TILES * 128, BLOCK_N)
    tile_m, tile = sharing.grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, x_ptrs, weight_ptrs, scale_zero_ptrs = pointers(
        x_ptr, weight_ptr, scale_zero_ptr, tile, tokens, M, K, TILES, BLOCK_N, True
    )
    if PDL:
        line = tl.minimum(tile * BLOCK_N // 128 * 96 + tl.arange(0, 128), TILES * 96 - 1)
        sharing.start_early(weight_ptr + line * 64, PDL, FETCH)
    acc = product_of_groups(
        x_ptrs, (tokens < M)[None, :], weight_ptrs, scale_zero_ptrs, 0, groups_of(K, RAGGED), K,
        TILES, BLOCK_M, BLOCK_N, STAGES, ORDER, DTYPE, RAGGED, USE_PTX,
    )  # fmt: skip
    sharing.store_out(out_ptr, acc, bias_ptr, rows, tokens, M, N, HAS_BIAS)


@triton.jit
def _store_half_group(ptrs, w, inside, left, RAGGED: tl.constexpr):
    """w [R, 64] of rows that have `left` more inputs."""
    if RAGGED:
        inside &= (tl.arange(0, 64) < left)[None, :]
    tl.store(ptrs, w, mask=inside)


@triton.jit(do_not_specialize=["first_tile", "TILES"])
def w3a16_dequantize_kernel(
    weight_ptr, scale_zero_ptr, out_ptr, N, K, TILES, first_tile,
    ORDER: tl.constexpr, RAGGED: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of 128 rows, pairs of groups): rows first_tile * 128 ... of the weight [N, K].

    out [rows of the slice, K], each weight rounded once, as the other kernels round it.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tile, pair = tl.program_id(0) + first_tile, tl.program_id(1)
    row = tl.arange(0, 128)
    planes = weight_ptr + (pair * TILES + tile) * 6144
    planes += row[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = scale_zero_ptr + (pair * TILES + tile) * 256 + row * 2
    a0, b0, c0 = tl.load(planes), tl.load(planes + 1024), tl.load(planes + 2048)
    a1, b1, c1 = tl.load(planes + 3072), tl.load(planes + 4096), tl.load(planes + 5120)
    word0, word1 = tl.load(words), tl.load(words + 1)
    where = out_ptr + ((tl.program_id(0) * 128 + row)[:, None].to(tl.int64) * K + pair * 256)
    where += tl.arange(0, 64)[None, :]
    inside = (tile * 128 + row < N)[:, None]
    left = K - pair * 256
    w = _half_group(a0, b0, c0, word0, 0, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where, w, inside, left, RAGGED)
    w = _half_group(a0, b0, c0, word0, 1, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 64, w, inside, left - 64, RAGGED)
    inside &= tl.full([1, 1], pair * 256 + 128, tl.int32) < K
    w = _half_group(a1, b1, c1, word1, 0, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 128, w, inside, left - 128, RAGGED)
    w = _half_group(a1, b1, c1, word1, 1, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 192, w, inside, left - 192, RAGGED)


def prepare(tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) in the kernels' layout.

    dtype: of the activations (16 bits), in which the scale is kept.
    """
    return layout.repack_w3a16(
        tensors["weight_packed"],
        tensors["weight_scale"].to(dtype),
        tensors["weight_zero_point"],
        launch.orders(tensors["weight_packed"].device).weights,
    )


def zeros(n: int, k: int, device: torch.device) -> Prepared:
    """Tensors of zero weights [N, K], in the shapes of `prepare`."""
    pairs, rows = layout.padded_pairs(k), layout.padded_rows(n)
    shape = (pairs, rows // layout.ROW_TILE, 2, 3, layout.ROW_TILE, 16)
    return {
        "weight_planes": torch.zeros(shape, dtype=torch.int8, device=device),
        "scale_zero": torch.zeros(pairs, rows, 2, dtype=torch.int32, device=device),
    }


def linear(
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    bias: torch.Tensor | None,
    tile: Tile,
    scratch: Scratch,
    use_ptx: bool = True,
) -> torch.Tensor:
    """x [M, K] contiguous times the prepared weight transposed (+ bias [N]): [M, N] of x's dtype.

    use_ptx=False takes the pure Triton twin. ValueError if the scratch memory does not suffice.
    """
    planes, scale_zero = prepared["weight_planes"], prepared["scale_zero"]
    m, k = x.shape
    if tile.regime == "dequantize":
        return _dequantized_linear(x, planes, scale_zero, n, bias, tile, use_ptx)
    if tile.regime == "halves":
        halves_of_x, x_scale_sum = quantize_activation.split_halves(x, tile)
        return halves.product(
            halves_of_x, x_scale_sum, planes, scale_zero, bias, n, x.dtype, tile, scratch, use_ptx
        )
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles = planes.shape[1]
    launch.run(
        w3a16_prefill_kernel, w3a16_shared_kernel,
        (x, planes.view(torch.int16), scale_zero, bias, out),
        (m, n, k, tiles), tiles * layout.ROW_TILE, tile, scratch, torch.float32,
        ORDER=launch.orders(x.device).weights, HAS_BIAS=bias is not None,
        RAGGED=k % layout.GROUP != 0, USE_PTX=use_ptx,
    )  # fmt: skip
    return out


def _dequantized_linear(
    x: torch.Tensor, planes: torch.Tensor, scale_zero: torch.Tensor, n: int,
    bias: torch.Tensor | None, tile: Tile, use_ptx: bool,
) -> torch.Tensor:  # fmt: skip
    """Through cuBLAS; `tile.block_n` rows of the weight at a time, or all of them at once (0)."""
    rows = tile.block_n or n
    if rows >= n:
        weight = dequantize(planes, scale_zero, n, x.shape[1], x.dtype, use_ptx)
        return torch.nn.functional.linear(x, weight, bias)
    return library.linear_in_slices(
        x, n, rows, bias,
        lambda first, last, out: _dequantize_rows(planes, scale_zero, first, last, out, use_ptx),
    )  # fmt: skip


def dequantize(
    planes: torch.Tensor, scale_zero: torch.Tensor, n: int, k: int, dtype: torch.dtype,
    use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The weight [N, K], rounded to `dtype`."""
    weight = torch.empty(n, k, dtype=dtype, device=planes.device)
    return _dequantize_rows(planes, scale_zero, 0, n, weight, use_ptx)


def _dequantize_rows(
    planes: torch.Tensor, scale_zero: torch.Tensor, first: int, last: int, out: torch.Tensor,
    use_ptx: bool,
) -> torch.Tensor:  # fmt: skip
    """Rows first to last (first: a multiple of 128) into out [last - first, K]."""
    k = out.shape[1]
    grid = (triton.cdiv(last - first, layout.ROW_TILE), layout.padded_pairs(k))
    w3a16_dequantize_kernel[grid](
        planes.view(torch.int16), scale_zero, out, last, k, planes.shape[1],
        first // layout.ROW_TILE, ORDER=launch.orders(planes.device).weights,
        RAGGED=k % layout.GROUP != 0, USE_PTX=use_ptx, **launch.FUSED,
    )  # fmt: skip
    return out


def candidates(m: int) -> list[Tile]:
    """Tiles to try at M tokens; what does not fit a device is skipped."""
    tiles = halves.candidates(m) if m <= MOST_HALVES else []
    shapes: tuple[tuple[Regime, int, int, int, int], ...] = (
        ("split_k", 16, 128, 4, 3), ("split_k", 32, 64, 4, 5), ("split_k", 32, 128, 4, 2),
        ("split_k", 32, 128, 4, 3), ("split_k", 64, 64, 4, 4), ("split_k", 64, 128, 4, 2),
        ("split_k", 128, 64, 4, 3), ("stream_k", 64, 64, 4, 4), ("stream_k", 64, 128, 4, 2),
        ("stream_k", 64, 256, 8, 1), ("stream_k", 128, 128, 4, 2), ("stream_k", 128, 128, 8, 1),
        ("stream_k", 128, 256, 8, 1),
    )  # fmt: skip
    if m > 8:
        tiles += [
            Tile(regime, block_m, block_n, warps, stages, programs, early=early)
            for regime, block_m, block_n, warps, programs in shapes
            if m // 4 <= block_m <= max(32, 2 * m)
            for stages in (2, 3)
            for early in (-1, 1)
        ]
    if m >= 128:
        tiles += [
            Tile("prefill", tokens, block_n, warps, stages)
            for tokens, block_n, warps in (
                (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8),
            )
            for stages in (2, 3)
        ]  # fmt: skip
        tiles += [Tile("dequantize", block_n=rows) for rows in (8448, 4224, 0)]
    return tiles


def kernel(tile: Tile, dtype: str, orders: launch.Orders) -> launch.Kernel:
    """What a launch with the tile compiles, for `dtype` ("bf16", "fp16")."""
    if tile.regime == "halves":
        return halves.kernel(tile, dtype, orders.of_halves(tile))
    arguments = dict(
        weight_ptr="*i16", scale_zero_ptr="*i32", out_ptr=f"*{dtype}", N="i32", K="i32", TILES="i32"
    )
    constants: dict[str, Any] = dict(ORDER=orders.weights, RAGGED=False, USE_PTX=True)
    if tile.regime == "dequantize":
        arguments |= {"first_tile": "i32"}
        return launch.of_tile(w3a16_dequantize_kernel, arguments, constants, tile, layout.PAIR)
    arguments |= dict(x_ptr=f"*{dtype}", bias_ptr=f"*{dtype}", M="i32")
    constants |= dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, HAS_BIAS=True
    )
    if tile.regime == "prefill":
        constants["GROUP_M"] = tile.group_m
        return launch.of_tile(w3a16_prefill_kernel, arguments, constants, tile, layout.GROUP)
    arguments |= dict(
        partials_ptr="*fp32", counter_ptr="*i32", tiles_m="i32", size="i32", rest="i32"
    )
    constants["ALIGNED"] = tile.regime == "split_k"
    return launch.of_tile(w3a16_shared_kernel, arguments, constants, tile, layout.GROUP)


def unsupported(n: int, k: int) -> str:
    """Why a linear [N, K] cannot run; empty if it can."""
    return ""


def warm_up(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what makes halves of activations, alone and fused with what precedes it."""
    quantizer_ops.warm_up_halves(k, dtype, device, _tiles_of_halves(launch.architecture(device)))


def _tiles_of_halves(architecture: str) -> list[Tile]:
    """A tile of tiles.json for each way in which halves are stored."""
    every = tiles_of(architecture, "w3a16", "halves")
    return list({launch.uses_wgmma(tile): tile for tile in every}.values())


def _w3a16_linear(
    x: torch.Tensor,
    weight_planes: torch.Tensor,
    scale_zero: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    m, k = x.shape
    if m == 0:
        return x.new_empty(0, n)
    tile = select("w3a16", launch.architecture(x.device), n, k, m)
    prepared = {"weight_planes": weight_planes, "scale_zero": scale_zero}
    scratch = launch.scratch(x.device)
    return linear(library.aligned(x), prepared, n, bias, tile, scratch, library.use_ptx(x))


def _of_halves(
    x: torch.Tensor,
    weight_planes: torch.Tensor,
    scale_zero: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> OfHalves | None:
    """The product that takes x in halves, if that is how M tokens are served."""
    m, k = x.shape
    if m == 0:
        return None
    tile = select("w3a16", launch.architecture(x.device), n, k, m)
    if tile.regime != "halves":
        return None
    dtype, scratch, use_ptx = x.dtype, launch.scratch(x.device), library.use_ptx(x)
    return tile, lambda given: halves.product(
        *given, weight_planes, scale_zero, bias, n, dtype, tile, scratch, use_ptx
    )


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[-1])


_ARGUMENTS = "Tensor weight_planes, Tensor scale_zero, Tensor? bias, int n"
library.define(f"w3a16_linear(Tensor x, {_ARGUMENTS}) -> Tensor", _w3a16_linear, _fake)
define_fused("w3a16_linear", _ARGUMENTS, _w3a16_linear, _of_halves, _fake)


def apply(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N] through the op, with the tile of tiles.json."""
    p = prepared
    return torch.ops.qig.w3a16_linear(x, p["weight_planes"], p["scale_zero"], bias, n)
