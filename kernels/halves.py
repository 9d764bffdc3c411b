"""16-bit activations times integer weights, for few tokens, on int8 tensor cores.

An element of x is a 16-bit fixed-point number q with a scale of its (token, group of 128 inputs),
and q is two int8 halves; quantize_activation.py makes them:

    x[m, k] = s[m, g] * q[m, k]        q = 256 * hi + lo,  hi and lo within -128..127

Weights stay the integers they are. Two int8 products take the place of one in bf16, at twice its
rate, and the sums are exact:

    d_hi, d_lo  = sum_{k in g} w[n, k] * hi[m, k],  ... lo[m, k]                   int32, exact
    out[m, n]  += (256 * d_hi + d_lo - zero[n, g] * sum_{k in g} q[m, k]) * s[m, g] * scale[n, g]

Why not bf16: codes are bytes here, four to a register where bf16 has two, without magic numbers and
additions; a token is two columns of the product, and a tensor core works on at least eight, so at
one token nothing is lost. Scales are powers of two, so an element of bf16 within a factor 64 of its
group's largest is represented exactly, and every other to 2^-16 of that largest (bf16's own
rounding: 2^-9 of each); reference.split_halves is the definition.

3-bit weights (layout.py). Three bytes, one of each plane, hold eight codes, c0 to c7 of position p:

    bit          7 6        5 4 3    2 1 0
    plane A  c3 bits 1-0      c4       c0      weight_planes int8 [pairs, N_pad/128, 2, 3, 128, 16]:
    plane B  c7 bits 1-0      c5       c1      (group, plane, row, p), 12 KiB per pair of groups
    plane C  c7.2  c3.2       c6       c2

Four neighbouring bytes are a register of the tensor core's left operand. Each of the eight outputs
is 8 * code, at bits 3-5 of its bytes: c4, c5, c6 by one mask, c0, c1, c2 by a shift and a mask, c3
and c7 gathered from two planes by two shifts, a blend and a mask. 17 operations for 32 weights,
0.53 per weight.

8-bit weights (of the output head) need no unpacking: weight_bytes int8 [pairs, N_pad/128, 2, 128,
128], no zero points, and one scale per row as the last factor. The rest is the same.

What is small travels in one word: of a (token, group) s / 8, for the codes are 8 * code, and minus
the sum of q (x_scale_sum: bits 23-30, fp32's exponent, and 0-22), of a (row, group) the scale and
the zero point (scale_zero: fp32, whose last three bits are the zero point; the scale is used with
them, which is worth seven units in its last place, 8e-7). Two groups are one step of the loop and
one load of each.

The order of inputs. A sum over k does not care for it, so codes lie where they cost nothing:

  - The bf16 kernels (w3a16.py) read the same planes, and make numbers of bytes 0 and 2 of a
    register, then of 1 and 3. On Hopper (wgmma) a thread's registers hold inputs 2t, 2t+1 and 2t+8,
    2t+9 of 16: byte 4t + i of a slice of 16 holds 2t + (0, 8, 1, 9)[i] (layout.ORDERS[16]).
  - mma.sync (the others) is given eight neighbouring inputs per thread by Triton wherever a value
    was joined from several. So byte 4t + i of slice c of 16 holds 8t + 4 (c % 2) + (0, 2, 1, 3)[i]
    of slice c / 2 of 32 (ORDERS[32]).
  - x's halves are stored as the int8 product takes them, which is as the bytes lie; but up to
    Triton 3.7 mma.sync's int8 has eight neighbours per thread too, and that is ORDERS[4], or beside
    Hopper's planes ORDERS[8].

What multiplies. From 8 tokens in a tile on (16 columns) Hopper's wgmma, four warps; below, mma.sync
with one or two warps and 8 columns, which waits for few other warps: for 4 tokens the four linears
of a Qwen2-VL-7B layer take 37.8 us on an H200, and 43.9 with wgmma.

Work is divided into equal shares (sharing.py). Scaling a group costs 5 operations per row and
token, 5 BLOCK_M / 128 per weight: so the kernel is for few tokens, and tiles.json says how few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch, sharing
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.layout import PAIR, ROW_TILE
from qig_serve.kernels.tiles import Tile

PLANES_PTX = tl.constexpr(
    """{ .reg .b32 a, b, c, t, u;
    mov.b32 a, $8; mov.b32 b, $9; mov.b32 c, $10;
    shl.b32 t, a, 3; and.b32 $0, t, 0x38383838;
    shl.b32 t, b, 3; and.b32 $1, t, 0x38383838;
    shl.b32 t, c, 3; and.b32 $2, t, 0x38383838;
    and.b32 $4, a, 0x38383838;
    and.b32 $5, b, 0x38383838;
    and.b32 $6, c, 0x38383838;
    shr.u32 t, a, 3; shr.u32 u, c, 1;
    lop3.b32 t, t, u, 0x18181818, 0xE4; and.b32 $3, t, 0x38383838;
    shr.u32 t, b, 3; shr.u32 u, c, 2;
    lop3.b32 t, t, u, 0x18181818, 0xE4; and.b32 $7, t, 0x38383838;
    }"""
)
"""$0-$7: 8 * codes c0..c7 of four kk, $8-$10: planes A, B, C. lop3 0xE4: c ? a : b, bit by bit."""


@triton.jit
def _eight_codes(a, b, c, USE_PTX: tl.constexpr):
    """Planes int8 [R, 16] -> 8 * codes c0..c7, int8 [R, 16] each."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            PLANES_PTX, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [a, b, c],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        a, b, c = a.to(tl.int32) & 255, b.to(tl.int32) & 255, c.to(tl.int32) & 255
        return (
            ((a << 3) & 0x38).to(tl.int8),
            ((b << 3) & 0x38).to(tl.int8),
            ((c << 3) & 0x38).to(tl.int8),
            (((a >> 3) & 0x18) | ((c >> 1) & 0x20)).to(tl.int8),
            (a & 0x38).to(tl.int8),
            (b & 0x38).to(tl.int8),
            (c & 0x38).to(tl.int8),
            (((b >> 3) & 0x18) | ((c >> 2) & 0x20)).to(tl.int8),
        )


@triton.jit
def _join_slices(c0, c1, c2, c3, c4, c5, c6, c7, BLOCK_N: tl.constexpr, X_ORDER: tl.constexpr):
    """Eight slices [R, 16] (row, position) -> [R, 128] in x's order: no instruction on a GPU."""
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    every = tl.join(even, odd).reshape(BLOCK_N, 4, 4, 2, 2, 2)  # [R, t, i, c / 4, c / 2 % 2, c % 2]
    if X_ORDER <= 8:
        ordered = every.permute(0, 3, 4, 1, 5, 2)
    else:
        ordered = every.permute(0, 3, 4, 5, 1, 2)
    return ordered.reshape(BLOCK_N, 128)


@triton.jit
def _load_weights(
    ptrs, BITS: tl.constexpr, BLOCK_N: tl.constexpr, X_ORDER: tl.constexpr, USE_PTX: tl.constexpr
):  # fmt: skip
    """int8 [BLOCK_N, 128]: 8 * codes of planes at [R, 16] pointers to the first, or bytes."""
    if BITS == 8:
        return tl.load(ptrs)
    else:
        c0, c1, c2, c3, c4, c5, c6, c7 = _eight_codes(
            tl.load(ptrs), tl.load(ptrs + 2048), tl.load(ptrs + 4096), USE_PTX
        )
        return _join_slices(c0, c1, c2, c3, c4, c5, c6, c7, BLOCK_N, X_ORDER)


@triton.jit
def _group_sums(
    weights, x, scale_zero, x_scale_sum,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A group's part of the output, fp32 [BLOCK_N, BLOCK_M].

    weights int8 [BLOCK_N, 128], x int8 [128, 2 * BLOCK_M], scale_zero int32 [BLOCK_N],
    x_scale_sum int32 [BLOCK_M].
    """
    products = tl.dot(weights, x, out_dtype=tl.int32)
    high, low = tl.split(products.reshape(BLOCK_N, BLOCK_M, 2))
    total = high * 256 + low
    x_scale = (x_scale_sum & 0x7F800000).to(tl.float32, bitcast=True)[None, :]
    if BITS == 8:
        return total.to(tl.float32) * x_scale
    else:
        total += (scale_zero & 7)[:, None] * ((x_scale_sum << 9) >> 6)[None, :]
        return total.to(tl.float32) * x_scale * scale_zero.to(tl.float32, bitcast=True)[:, None]


@triton.jit
def sum_of_pairs(
    halves_ptr, x_scale_sum_ptr, weight_ptr, scale_ptr, rows, tokens, columns, start, end,
    M, K, TILES,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, X_ORDER: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """W x^T over pairs start to end: fp32 [BLOCK_N, BLOCK_M], 8-bit weights not scaled yet.

    rows [BLOCK_N]; tokens [BLOCK_M], rows of x, and columns [2 * BLOCK_M], 2 * token for its high
    half and one more for its low one: zeros for what is not below M, and 2 * M.
    """
    ROW: tl.constexpr = 128 if BITS == 8 else 16  # bytes
    HALF: tl.constexpr = 16384 if BITS == 8 else 6144  # bytes of a layout tile's group
    k = tl.arange(0, 128)
    stored = tl.minimum(rows, TILES * 128 - 1)  # a half-filled last tile stores not all it reads
    weight_ptrs = weight_ptr + (stored // 128 * (2 * HALF) + stored % 128 * ROW)[:, None]
    weight_ptrs += tl.arange(0, ROW)[None, :]
    x_ptrs = halves_ptr + columns[None, :].to(tl.int64) * K + k[:, None]
    in_range = tokens < M
    x_in_range = (columns < 2 * M)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for pair in tl.range(start, end, num_stages=STAGES):
        weights = weight_ptrs + pair * (TILES * 2 * HALF)
        x_pair = x_ptrs + pair * 256
        x = tl.load(x_pair, mask=x_in_range, other=0)
        if EVEN:
            x_second = tl.load(x_pair + 128, mask=x_in_range, other=0)
        else:
            there = x_in_range & (pair * 256 + 128 + k < K)[:, None]
            x_second = tl.load(x_pair + 128, mask=there, other=0)
        x_scale_sum = tl.load(x_scale_sum_ptr + pair * M + tokens, mask=in_range, other=0)
        if BITS == 8:
            scale_zero = stored.to(tl.int64)  # not read
        else:
            scale_zero = tl.load(scale_ptr + pair * (TILES * 128) + stored)
        acc += _group_sums(
            _load_weights(weights, BITS, BLOCK_N, X_ORDER, USE_PTX), x,
            scale_zero.to(tl.int32), x_scale_sum.to(tl.int32), BITS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc += _group_sums(
            _load_weights(weights + HALF, BITS, BLOCK_N, X_ORDER, USE_PTX), x_second,
            (scale_zero >> 32).to(tl.int32), (x_scale_sum >> 32).to(tl.int32),
            BITS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["M", "TILES", "tiles_m", "size", "rest"])
def halves_kernel(
    halves_ptr, x_scale_sum_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr,
    partials_ptr, counter_ptr, M, N, K, TILES, tiles_m, size, rest,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, X_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), each with an equal share of an output tile's pairs of groups.

    halves int8 [M, 2, K]; x_scale_sum int64 [pairs, M], the first group of a pair in the low half;
    scale_ptr: scale_zero int64 [pairs, N_pad] in the same way, or fp32 [N_pad] of 8-bit weights.
    TILES: layout tiles of 128 rows. EVEN: K is whole pairs.
    """
    HALF: tl.constexpr = 16384 if BITS == 8 else 6144  # bytes of a layout tile's group
    LINES: tl.constexpr = 2 * HALF // 128
    pairs = tl.cdiv(K, 256)
    first, last = sharing.share(pairs, size, rest, True)
    row = tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    if PDL:
        ahead = first % pairs * TILES + first // pairs // tiles_m * BLOCK_N // 128
        line = tl.minimum(ahead * LINES + tl.arange(0, 128), pairs * TILES * LINES - 1)
        sharing.start_early(weight_ptr + line.to(tl.int64) * 128, PDL, FETCH)
    tile = first // pairs
    start = first - tile * pairs
    end = start + last - first
    rows = tile // tiles_m * BLOCK_N + row
    tokens = tile % tiles_m * BLOCK_M + token
    columns = tile % tiles_m * (2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M)
    acc = sum_of_pairs(
        halves_ptr, x_scale_sum_ptr, weight_ptr, scale_ptr, rows, tokens, columns, start, end,
        M, K, TILES, BITS, BLOCK_M, BLOCK_N, STAGES, EVEN, X_ORDER, USE_PTX,
    )  # fmt: skip
    if BITS == 8:
        acc *= tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    if end - start == pairs:
        sharing.store_out(out_ptr, acc, bias_ptr, rows, tokens, M, N, HAS_BIAS)
    else:
        here = tl.minimum(M - tile % tiles_m * BLOCK_M, BLOCK_M)
        complete, one, other = sharing.leave_part(
            acc, partials_ptr, counter_ptr, tile, pairs, size, rest, start == 0, here,
            BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        if complete:
            SOME: tl.constexpr = min(8, BLOCK_M)
            for i in tl.range(0, here, SOME):
                total = sharing.add_parts(partials_ptr, one, other, i, BLOCK_M, BLOCK_N, SOME, True)
                some = tile % tiles_m * BLOCK_M + i + tl.arange(0, SOME)
                sharing.store_out(out_ptr, total, bias_ptr, rows, some, M, N, HAS_BIAS)


def product(
    halves: torch.Tensor,
    x_scale_sum: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    dtype: torch.dtype,
    tile: Tile,
    scratch: Scratch,
    use_ptx: bool = True,
) -> torch.Tensor:
    """x in halves times a weight [N, K] transposed (+ bias): [M, N] of `dtype` (16 bits).

    halves int8 [M, 2, K] (K in whole groups) and x_scale_sum int32 [pairs, M, 2], of
    quantize_activation.split_halves; weights and scale: weight_planes and scale_zero
    (layout.repack_w3a16), or weight_bytes and row_scale (layout.repack_w8a16). use_ptx=False takes
    the pure Triton twin. ValueError if the scratch memory does not suffice.
    """
    m, _, k = halves.shape
    bits = 3 if scale.dim() == 3 else 8
    tiles, pairs = weights.shape[1], weights.shape[0]
    tiles_m, tiles_n = triton.cdiv(m, tile.block_m), triton.cdiv(tiles * ROW_TILE, tile.block_n)
    count = launch.programs(tile, tiles_m * tiles_n, pairs, launch.multiprocessors(halves.device))
    partials = scratch.partial_sums(tile, count, tiles_m * tiles_n, torch.float32)
    out = torch.empty(m, n, dtype=dtype, device=halves.device)
    halves_kernel[(count,)](
        halves, x_scale_sum.view(torch.int64), weights,
        scale.view(torch.int64) if bits == 3 else scale, bias, out, partials, scratch.counters,
        m, n, k, tiles, tiles_m, *launch.shares(count, tiles_m * tiles_n, pairs, True),
        BITS=bits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages,
        EVEN=k % PAIR == 0, X_ORDER=launch.orders(halves.device).of_halves(tile),
        HAS_BIAS=bias is not None, USE_PTX=use_ptx, **launch.options(tile, halves.device),
    )  # fmt: skip
    return out


def kernel(tile: Tile, dtype: str, order: int, bits: int = 3) -> launch.Kernel:
    """What a launch with the tile compiles, for `dtype` ("bf16", "fp16") and x in `order`."""
    arguments = dict(
        halves_ptr="*i8", x_scale_sum_ptr="*i64", weight_ptr="*i8",
        scale_ptr="*i64" if bits == 3 else "*fp32", bias_ptr=f"*{dtype}", out_ptr=f"*{dtype}",
        partials_ptr="*fp32", counter_ptr="*i32", M="i32", N="i32", K="i32", TILES="i32",
        tiles_m="i32", size="i32", rest="i32",
    )  # fmt: skip
    constants = dict(
        BITS=bits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, EVEN=True,
        X_ORDER=order, HAS_BIAS=True, USE_PTX=True,
    )  # fmt: skip
    return launch.of_tile(halves_kernel, arguments, constants, tile, PAIR)


def candidates(m: int) -> list[Tile]:
    """Tiles to try at M tokens."""
    block_m = max(4, 1 << (m - 1).bit_length())
    shapes = {
        4: ((64, 2, 4), (64, 2, 8), (32, 1, 16)),
        8: ((128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 4, 5), (256, 4, 2), (256, 4, 3),
            (64, 2, 8)),
        16: ((128, 4, 2), (128, 4, 4), (256, 4, 2)),
        32: ((64, 4, 4),),
    }  # fmt: skip
    return [
        Tile("halves", tokens, block_n, warps, stages, programs, early=early)
        for tokens, offered in shapes.items()
        if min(block_m, 16) // 2 <= tokens <= max(8, block_m)
        for block_n, warps, programs in offered
        for stages in (2, 3)
        for early in (-1, 1)
    ]
