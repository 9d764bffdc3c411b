"""W3A16: x [M, K] (bf16, fp16) times a dense 3-bit weight [N, K] transposed, groups of 128 along K.

    out[m, n] = sum_g scale[n, g] * sum_{k in g} x[m, k] * (code[n, k] - zero[n, g])  (+ bias[n])

Read on in this order: halves.py, the kernel for few tokens, with the drawing of the bytes;
three_bits.py (half a group's codes made numbers, in PTX, and its twin in Triton); then here
`product_of_groups`, `_part`, `w3a16_shared_kernel`.

Checkpoint layout (formats.py): a row's codes w0, w1, ... are a stream of 3-bit fields, lowest bits
first; 32 of them are three int32 words, and w10 and w21 lie across two words.

    word 0                     word 1                    word 2
    w0 w1 ... w9 w10(2 bits)   w10(1) w11 ... w21(1)     w21(2) w22 ... w31

Kernel layout (layout.py): three byte planes of a group, drawn in halves.py; 24 bits hold 8
codes, nothing is padded. Scale and zero point of a (row, group) are the 32 bits of an fp32 number
whose last three are the zero point: 3.25 bits per weight in all.

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
    three_bits,
    w3a16_dequantize,
)
from qig_serve.kernels.fused_linear import OfHalves, define_fused
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.library import Prepared
from qig_serve.kernels.tiles import Regime, Tile, select, tiles_of

MOST_HALVES = 64
"""Most tokens at which halves tiles are tried."""
FUSES_ACTIVATIONS = True
"""Whether vLLM's graphs are to put the norm or SiLU before a linear into its op."""


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
        x_first = sharing.load_inputs(x, x_in_range, left, BLOCK_M, RAGGED)
        x_second = sharing.load_inputs(x + 64, x_in_range, left - 64, BLOCK_M, RAGGED)
        w = three_bits.half_group(a, b, c, scale_zero, 0, BLOCK_N, ORDER, DTYPE, USE_PTX)
        acc = tl.dot(w, x_first, acc)
        w = three_bits.half_group(a, b, c, scale_zero, 1, BLOCK_N, ORDER, DTYPE, USE_PTX)
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
    x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None, tile: Tile,
    scratch: Scratch, use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] contiguous times the prepared weight transposed (+ bias [N]): [M, N] of x's dtype.

    use_ptx=False takes the pure Triton twin. ValueError if the scratch memory does not suffice.
    """
    planes, scale_zero = prepared["weight_planes"], prepared["scale_zero"]
    m, k = x.shape
    if tile.regime == "dequantize":
        return w3a16_dequantize.linear(x, planes, scale_zero, n, bias, tile, use_ptx)
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
    constants: dict[str, Any] = dict(ORDER=orders.weights, RAGGED=False)
    if tile.regime == "dequantize":
        function = w3a16_dequantize.w3a16_dequantize_kernel
        arguments |= {"first_tile": "i32"}
        return launch.of_tile(function, arguments, constants | {"USE_PTX": True}, tile, layout.PAIR)
    arguments |= dict(x_ptr=f"*{dtype}", bias_ptr=f"*{dtype}", M="i32")
    return launch.of_linear(
        w3a16_prefill_kernel, w3a16_shared_kernel, arguments, constants, tile, "fp32"
    )


def unsupported(k: int) -> str:
    """Why a linear of K inputs cannot run; empty if it can."""
    return ""


def warm_up(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what makes halves of activations, alone and fused with what precedes it."""
    quantizer_ops.warm_up_halves(k, dtype, device, _tiles_of_halves(launch.architecture(device)))


def _tiles_of_halves(architecture: str) -> list[Tile]:
    """A tile of tiles.json for each way in which halves are stored."""
    every = tiles_of(architecture, "w3a16", "halves")
    return list({launch.uses_wgmma(tile): tile for tile in every}.values())


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


_w3a16_linear = launch.op_of("w3a16", ("weight_planes", "scale_zero"), linear)
_ARGUMENTS = "Tensor weight_planes, Tensor scale_zero, Tensor? bias, int n"
library.define(f"w3a16_linear(Tensor x, {_ARGUMENTS}) -> Tensor", _w3a16_linear, _fake)
define_fused("w3a16_linear", _ARGUMENTS, _w3a16_linear, _of_halves, _fake)


def apply(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N] through the op, with the tile of tiles.json."""
    p = prepared
    return torch.ops.qig.w3a16_linear(x, p["weight_planes"], p["scale_zero"], bias, n)
