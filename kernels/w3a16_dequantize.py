"""A 3-bit weight [N, K] written out in 16 bits, for cuBLAS or to look at."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch, layout, library, three_bits
from qig_serve.kernels.tiles import Tile


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
    w = three_bits.half_group(a0, b0, c0, word0, 0, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where, w, inside, left, RAGGED)
    w = three_bits.half_group(a0, b0, c0, word0, 1, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 64, w, inside, left - 64, RAGGED)
    inside &= tl.full([1, 1], pair * 256 + 128, tl.int32) < K
    w = three_bits.half_group(a1, b1, c1, word1, 0, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 128, w, inside, left - 128, RAGGED)
    w = three_bits.half_group(a1, b1, c1, word1, 1, 128, ORDER, DTYPE, USE_PTX)
    _store_half_group(where + 192, w, inside, left - 192, RAGGED)


def linear(
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
