"""Few tokens, few outputs: the warps of a program divide K among themselves.

A layer like o_proj of a 7B model (3,584 x 3,584) has 112 tiles of 32 rows for 132 multiprocessors,
and its weights arrive within 1.2 us. Divided among programs, as launch.py does it, K costs a store
of partial sums, a fence, a counter and a load, one after the other: 2 to 3 us. Divided among the
warps of one program it costs a sum through shared memory.

A product over a leading axis does it: Triton gives each warp whole matrices of a batch, so in

    [WAYS, BLOCK_N, 128] x [WAYS, 128, columns] -> [WAYS, BLOCK_N, columns]

with as many ways as warps, each warp multiplies on its own (mma.sync), without a barrier that
waits for the others' products. Step i of the loop gives way w the block i + w. Beyond the end a
way reads the last block again, and multiplies with zeros.

Numbers and layouts are those of halves.py and w4a8.py. Where one program a tile is too few, K is
divided among programs as well (Tile.splits)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import halves, int4, launch
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.layout import GROUP, PAIR, ROW_TILE
from qig_serve.kernels.tiles import Tile


@triton.jit
def _finish(
    total, out_ptr, bias_ptr, token_scale_ptr, channel_scale_ptr, partials_ptr, counter_ptr, tile,
    tile_n, tile_m, blocks, size, whole, starts, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store a program's sums [BLOCK_N, BLOCK_M], or leave them for whoever comes last."""
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if whole:
        _store(
            total, out_ptr, bias_ptr, token_scale_ptr, channel_scale_ptr, rows, tokens, M, N,
            HAS_BIAS, SCALED,
        )  # fmt: skip
    else:
        here = tl.minimum(M - tile_m * BLOCK_M, BLOCK_M)
        complete, one, other = launch.leave_part(
            total, partials_ptr, counter_ptr, tile, blocks, size, 0, starts, here,
            BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        if complete:
            added = launch.add_parts(partials_ptr, one, other, 0, BLOCK_M, BLOCK_N, BLOCK_M, True)
            _store(
                added, out_ptr, bias_ptr, token_scale_ptr, channel_scale_ptr, rows, tokens, M, N,
                HAS_BIAS, SCALED,
            )  # fmt: skip


@triton.jit
def _store(
    total, out_ptr, bias_ptr, token_scale_ptr, channel_scale_ptr, rows, tokens, M, N,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    if SCALED:
        launch.store_out(out_ptr, total, bias_ptr, rows, tokens, M, N, HAS_BIAS)
    else:
        int4.store(
            out_ptr, total, token_scale_ptr, channel_scale_ptr, bias_ptr, rows, tokens, M, N,
            HAS_BIAS,
        )  # fmt: skip


@triton.jit
def _codes(ptrs, WAYS: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
           USE_PTX: tl.constexpr):  # fmt: skip
    """Planes int8 at [WAYS, BLOCK_N, 16] pointers to the first -> 8 * codes [WAYS, BLOCK_N, 128]"""
    ROWS: tl.constexpr = WAYS * BLOCK_N
    a, b, c = tl.load(ptrs), tl.load(ptrs + 2048), tl.load(ptrs + 4096)
    c0, c1, c2, c3, c4, c5, c6, c7 = halves._eight_codes(a, b, c, USE_PTX)
    joined = halves._join_slices(
        c0.reshape(ROWS, 16), c1.reshape(ROWS, 16), c2.reshape(ROWS, 16), c3.reshape(ROWS, 16),
        c4.reshape(ROWS, 16), c5.reshape(ROWS, 16), c6.reshape(ROWS, 16), c7.reshape(ROWS, 16),
        ROWS, ORDER,
    )  # fmt: skip
    return joined.reshape(WAYS, BLOCK_N, 128)


@triton.jit
def _group_sums(weights, x, scale_zero, x_scale_sum, WAYS: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """As halves._group_sums, for a group a way: fp32 [WAYS, BLOCK_N, BLOCK_M]."""
    products = tl.dot(weights, x, out_dtype=tl.int32)
    high, low = tl.split(products.reshape(WAYS, BLOCK_N, BLOCK_M, 2))
    total = high * 256 + low
    total += (scale_zero & 7)[:, :, None] * ((x_scale_sum << 9) >> 6)[:, None, :]
    x_scale = (x_scale_sum & 0x7F800000).to(tl.float32, bitcast=True)[:, None, :]
    return total.to(tl.float32) * x_scale * scale_zero.to(tl.float32, bitcast=True)[:, :, None]


@triton.jit(do_not_specialize=["M", "TILES", "tiles_m", "size"])
def halves_warps_kernel(
    halves_ptr, x_scale_sum_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr,
    partials_ptr, counter_ptr, M, N, K, TILES, tiles_m, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, X_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles * size,); tensors as halves_kernel has them, of 3-bit weights."""
    pairs = tl.cdiv(K, 256)
    first, last = launch.share(pairs, size, 0, True)
    tile = first // pairs
    start = first - tile * pairs
    end = start + last - first
    tile_n, tile_m = tile // tiles_m, tile % tiles_m
    if PDL:
        ahead = tl.minimum(start + tl.arange(0, 128) // 8, pairs - 1)
        line = (ahead * TILES + tile_n * BLOCK_N // 128) * 96 + tl.arange(0, 128) % 8
        launch.start_early(weight_ptr + line.to(tl.int64) * 128, PDL, FETCH)
    way = tl.arange(0, WAYS)
    k = tl.arange(0, 128)
    rows = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), TILES * 128 - 1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_m * (2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M)
    weight_ptrs = weight_ptr + (rows // 128 * 12288 + rows % 128 * 16)[None, :, None]
    weight_ptrs += tl.arange(0, 16)[None, None, :]
    x_ptrs = halves_ptr + columns[None, None, :].to(tl.int64) * K + k[None, :, None]
    x_in_range = (columns < 2 * M)[None, None, :]
    in_range = (tokens < M)[None, :]
    acc = tl.zeros([WAYS, BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(start, end, WAYS, num_stages=STAGES):
        pair = tl.minimum(step + way, pairs - 1)
        weights = weight_ptrs + (pair * (TILES * 12288))[:, None, None]
        x_pair = x_ptrs + (pair * 256)[:, None, None]
        x = tl.load(x_pair, mask=x_in_range, other=0)
        if EVEN:
            x_second = tl.load(x_pair + 128, mask=x_in_range, other=0)
        else:
            there = x_in_range & ((pair * 256 + 128)[:, None, None] + k[None, :, None] < K)
            x_second = tl.load(x_pair + 128, mask=there, other=0)
        mine = in_range & (step + way < end)[:, None]  # else a scale of zero
        x_scale_sum = tl.load(
            x_scale_sum_ptr + pair[:, None] * M + tokens[None, :], mask=mine, other=0
        )
        scale_zero = tl.load(scale_ptr + (pair * (TILES * 128))[:, None] + rows[None, :])
        acc += _group_sums(
            _codes(weights, WAYS, BLOCK_N, X_ORDER, USE_PTX), x, scale_zero.to(tl.int32),
            x_scale_sum.to(tl.int32), WAYS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc += _group_sums(
            _codes(weights + 6144, WAYS, BLOCK_N, X_ORDER, USE_PTX), x_second,
            (scale_zero >> 32).to(tl.int32), (x_scale_sum >> 32).to(tl.int32),
            WAYS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _finish(
        tl.sum(acc, axis=0), out_ptr, bias_ptr, scale_ptr, scale_ptr, partials_ptr, counter_ptr,
        tile, tile_n, tile_m, pairs, size, end - start == pairs, start == 0, M, N,
        BLOCK_M, BLOCK_N, HAS_BIAS, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "tiles_m", "size"])
def w4a8_warps_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, bias_ptr, out_ptr,
    partials_ptr, counter_ptr, M, N, K, N_PAD, tiles_m, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_PTX: tl.constexpr, PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles * size,); tensors as w4a8_shared_kernel has them."""
    blocks = K // 128
    first, last = launch.share(blocks, size, 0, True)
    tile = first // blocks
    start = first - tile * blocks
    end = start + last - first
    tile_n, tile_m = tile // tiles_m, tile % tiles_m
    if PDL:
        ahead = tl.minimum(start + tl.arange(0, 128) // 16, blocks - 1)
        line = (ahead * N_PAD + tile_n * BLOCK_N) // 2 + tl.arange(0, 128) % (BLOCK_N // 2)
        launch.start_early(nibbles_ptr + line.to(tl.int64) * 128, PDL, FETCH)
    ROWS: tl.constexpr = WAYS * BLOCK_N
    way = tl.arange(0, WAYS)
    k = tl.arange(0, 128)
    rows = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N_PAD - 1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    nibble_ptrs = nibbles_ptr + (rows * 64)[None, :, None] + tl.arange(0, 64)[None, None, :]
    code_ptrs = codes_ptr + tokens[None, None, :].to(tl.int64) * K + k[None, :, None]
    in_range = (tokens < M)[None, None, :]
    acc = tl.zeros([WAYS, BLOCK_N, BLOCK_M], tl.int32)
    for step in tl.range(start, end, WAYS, num_stages=STAGES):
        block = tl.minimum(step + way, blocks - 1)
        nibbles = tl.load(nibble_ptrs + (block * (N_PAD * 64))[:, None, None])
        mine = in_range & (step + way < end)[:, None, None]
        codes = tl.load(code_ptrs + (block * 128)[:, None, None], mask=mine, other=0)
        weights = int4.unpack(nibbles.reshape(ROWS, 64), ROWS, USE_PTX)
        acc = tl.dot(weights.reshape(WAYS, BLOCK_N, 128), codes, acc, out_dtype=tl.int32)
    _finish(
        tl.sum(acc, axis=0), out_ptr, bias_ptr, token_scale_ptr, channel_scale_ptr, partials_ptr,
        counter_ptr, tile, tile_n, tile_m, blocks, size, end - start == blocks, start == 0, M, N,
        BLOCK_M, BLOCK_N, HAS_BIAS, False,
    )  # fmt: skip


def _launch(
    kernel: Any, tensors: tuple[torch.Tensor | None, ...], sizes: tuple[int, int, int, int],
    rows: int, blocks: int, tile: Tile, scratch: Scratch, sums: torch.dtype, **constants: Any,
) -> None:  # fmt: skip
    """sizes: M, N, K and the weight's; rows: of the weight, padded; blocks: what a way takes."""
    first = tensors[0]
    assert first is not None
    tiles_m = triton.cdiv(sizes[0], tile.block_m)
    output_tiles = tiles_m * triton.cdiv(rows, tile.block_n)
    count = launch.programs(tile, output_tiles, blocks, launch.multiprocessors(first.device))
    partials = scratch.partial_sums(tile, count, output_tiles, sums)
    kernel[(count,)](
        *tensors, partials, scratch.counters, *sizes, tiles_m, count // output_tiles,
        **_constants(tile), **constants, **launch.options(tile, first.device),
    )  # fmt: skip


def _constants(tile: Tile) -> dict[str, int]:
    return dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WAYS=tile.num_warps, STAGES=tile.num_stages
    )


def product_of_halves(
    halves: torch.Tensor, x_scale_sum: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, n: int, dtype: torch.dtype, tile: Tile, scratch: Scratch,
    use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """As halves.product, of 3-bit weights, with a tile of regime "warps"."""
    m, _, k = halves.shape
    pairs, tiles = weights.shape[:2]
    out = torch.empty(m, n, dtype=dtype, device=halves.device)
    _launch(
        halves_warps_kernel,
        (halves, x_scale_sum.view(torch.int64), weights, scale.view(torch.int64), bias, out),
        (m, n, k, tiles), tiles * ROW_TILE, pairs, tile, scratch, torch.float32,
        EVEN=k % PAIR == 0, X_ORDER=launch.orders(halves.device).of_halves(tile),
        HAS_BIAS=bias is not None, USE_PTX=use_ptx,
    )  # fmt: skip
    return out


def product_of_codes(
    codes: torch.Tensor, token_scale: torch.Tensor, nibbles: torch.Tensor,
    channel_scale: torch.Tensor, bias: torch.Tensor | None, n: int, dtype: torch.dtype, tile: Tile,
    scratch: Scratch, use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """As w4a8.product, with a tile of regime "warps"."""
    m, k = codes.shape
    n_pad = nibbles.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    _launch(
        w4a8_warps_kernel, (codes, token_scale, nibbles, channel_scale, bias, out),
        (m, n, k, n_pad), n_pad, k // GROUP, tile, scratch, torch.int32,
        HAS_BIAS=bias is not None, USE_PTX=use_ptx,
    )  # fmt: skip
    return out


def kernel_of_halves(tile: Tile, dtype: str, order: int) -> launch.Kernel:
    """What product_of_halves compiles."""
    plain = halves.kernel(tile, dtype, order)
    constants = {**plain.constants, "WAYS": tile.num_warps}
    return _kernel(halves_warps_kernel, plain.arguments, constants, tile, PAIR)


def kernel_of_codes(tile: Tile, dtype: str) -> launch.Kernel:
    """What product_of_codes compiles."""
    arguments = dict(
        codes_ptr="*i8", token_scale_ptr="*fp32", nibbles_ptr="*i8", channel_scale_ptr="*fp32",
        bias_ptr=f"*{dtype}", out_ptr=f"*{dtype}", partials_ptr="*i32", counter_ptr="*i32",
        M="i32", N="i32", K="i32", N_PAD="i32", tiles_m="i32", size="i32",
    )  # fmt: skip
    constants = dict(_constants(tile), HAS_BIAS=True, USE_PTX=True)
    return _kernel(w4a8_warps_kernel, arguments, constants, tile, GROUP)


def _kernel(
    function: Any, arguments: dict[str, str], constants: dict[str, Any], tile: Tile, inputs: int
) -> launch.Kernel:
    """With the arguments and constants that the function has."""
    names = function.arg_names
    return launch.of_tile(
        function,
        {name: kind for name, kind in arguments.items() if name in names},
        {name: value for name, value in constants.items() if name in names},
        tile,
        inputs * tile.num_warps,
    )


def candidates(m: int, shapes: tuple[tuple[int, int, int, int], ...]) -> list[Tile]:
    """Tiles to try at M tokens, of shapes (tokens, outputs, warps, programs an SM)."""
    return [
        Tile("warps", tokens, outputs, warps, stages, programs, early=early, splits=splits)
        for tokens, outputs, warps, programs in shapes
        if tokens >= m or (m <= 16 and tokens == shapes[-1][0])
        for stages in (2, 3)
        for early in (-1, 1)
        for splits in (1, 2, 4)
    ]
