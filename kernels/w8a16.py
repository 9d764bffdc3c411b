"""The vocabulary's tables, 8-bit weights, one scale per row: the output head's product, and rows.

    qig::w8a16_linear       x [M, K] -> [M, N]
    qig::w8a16_embedding    ids [M] -> [M, K], the rows of the table in 16 bits

Both read the bytes of layout.repack_w8a16, so that a tied model holds one table. The product is
halves.py's, x in two int8 halves and sums exact, for few tokens; for many the rows are dequantized,
`tile.block_n` at a time, and go through cuBLAS. That is the regime "dequantize".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import halves, launch, layout, library, quantize_activation
from qig_serve.kernels.launch import Scratch
from qig_serve.kernels.library import Prepared
from qig_serve.kernels.tiles import Tile, tiles_of

FUSES_ACTIVATIONS = False
_MOST_HALVES = 256
_SLICE = 8448  # rows dequantized at a time: all of a vocabulary would take a gigabyte
_SOME, _MANY = 4, 32  # rows that a program looks up: of a few tokens, and of a slice


@triton.jit(do_not_specialize=["first", "M", "TILES"])
def w8a16_rows_kernel(
    ids_ptr, order_ptr, weight_ptr, scale_ptr, out_ptr, M, N, K, TILES, first,
    HAS_IDS: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, pairs of groups): rows ids, or first ..., of the table into [M, K].

    order int32 [128]: the input that lies at each place of a group. RAGGED: 128 does not divide K.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(1)
    there = token < M
    if HAS_IDS:
        row = tl.load(ids_ptr + token, mask=there, other=0).to(tl.int32)
    else:
        row = token + first
    row = tl.minimum(tl.maximum(row, 0), N - 1)
    place = tl.arange(0, 128)
    order = tl.load(order_ptr + place)
    scale = tl.load(scale_ptr + row) * 0.125  # 8 times the weight's
    bytes_ptr = weight_ptr + ((pair * TILES + row // 128) * 32768 + row % 128 * 128)[:, None]
    bytes_ptr += place[None, :]
    columns = pair * 256 + order
    out = out_ptr + token[:, None].to(tl.int64) * K + columns[None, :]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    w = tl.load(bytes_ptr).to(tl.float32) * scale[:, None]
    inside = there[:, None]
    if RAGGED:
        inside &= (columns < K)[None, :]
    tl.store(out, w.to(DTYPE), mask=inside)
    w = tl.load(bytes_ptr + 16384).to(tl.float32) * scale[:, None]
    tl.store(out + 128, w.to(DTYPE), mask=there[:, None] & (columns + 128 < K)[None, :])


@functools.cache
def table_order(device: torch.device) -> torch.Tensor:
    """The table's order of inputs, on its device."""
    order = layout.ORDERS[launch.orders(device).activations]
    return torch.tensor(order, dtype=torch.int32, device=device)


def _rows(
    prepared: Prepared, ids: torch.Tensor | None, first: int, n: int, out: torch.Tensor
) -> torch.Tensor:
    """Rows `ids` of a table of n, or `first` and what follows it, into out [M, K]."""
    weight = prepared["weight_bytes"]
    m, k = out.shape
    block = _MANY if ids is None else _SOME
    if m:
        w8a16_rows_kernel[triton.cdiv(m, block), weight.shape[0]](
            ids, table_order(weight.device), weight, prepared["row_scale"], out, m, n, k,
            weight.shape[1], first, HAS_IDS=ids is not None, BLOCK=block,
            RAGGED=k % layout.GROUP != 0, **launch.FUSED,
        )  # fmt: skip
    return out


def prepare(tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one table (formats.tensor_specs) in the kernels' layout."""
    packed = tensors["weight_packed"]
    order = launch.orders(packed.device).activations
    table_order(packed.device)  # made before a CUDA graph is captured
    return layout.repack_w8a16(packed.view(torch.int8), tensors["weight_scale"], order)


def zeros(n: int, k: int, device: torch.device) -> Prepared:
    """Tensors of zero weights [N, K], in the shapes of `prepare`."""
    rows = layout.padded_rows(n)
    shape = (layout.padded_pairs(k), rows // layout.ROW_TILE, 2, layout.ROW_TILE, layout.GROUP)
    return {
        "weight_bytes": torch.zeros(shape, dtype=torch.int8, device=device),
        "row_scale": torch.zeros(rows, dtype=torch.float32, device=device),
    }


def linear(
    x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None, tile: Tile,
    scratch: Scratch, use_ptx: bool = True,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] contiguous times the prepared table transposed (+ bias [N]): [M, N] of x's dtype.

    use_ptx: as of the other schemes; there is nothing to unpack. ValueError for a tile that wants x
    in another order than the table's, or if the scratch memory does not suffice.
    """
    if tile.regime == "dequantize":
        return _dequantized_linear(x, prepared, n, bias, tile)
    orders = launch.orders(x.device)
    if orders.of_halves(tile) != orders.activations:
        raise ValueError(f"{tile} is too narrow for the order in which the table lies")
    halves_of_x, x_scale_sum = quantize_activation.split_halves(x, tile)
    return halves.product(
        halves_of_x, x_scale_sum, prepared["weight_bytes"], prepared["row_scale"], bias, n,
        x.dtype, tile, scratch, use_ptx,
    )  # fmt: skip


def _dequantized_linear(
    x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """Through cuBLAS; `tile.block_n` rows of the table at a time, or all of them at once (0)."""
    return library.linear_in_slices(
        x, n, tile.block_n or n, bias,
        lambda first, last, out: _rows(prepared, None, first, n, out),
    )  # fmt: skip


def candidates(m: int) -> list[Tile]:
    """Tiles to try at M tokens; what does not fit a device is skipped."""
    if m > _MOST_HALVES:
        return [Tile("dequantize", block_n=_SLICE)]
    shapes = {8: ((4, 3), (4, 2)), 16: ((4, 3), (4, 2)), 32: ((8, 2), (8, 1)), 64: ((8, 1),)}
    nearest = min(64, max(8, 1 << (m - 1).bit_length()))
    tiles = [
        Tile("halves", tokens, 128, warps, stages, programs)
        for tokens, offered in shapes.items()
        if nearest // 2 <= tokens <= nearest
        for warps, programs in offered
        for stages in (2, 3)
    ]
    return [*tiles, Tile("dequantize", block_n=_SLICE)] if m >= 64 else tiles


def kernel(tile: Tile, dtype: str, orders: launch.Orders) -> launch.Kernel:
    """What a launch with the tile compiles, for `dtype` ("bf16", "fp16")."""
    if tile.regime == "halves":
        return halves.kernel(tile, dtype, orders.of_halves(tile), bits=8)
    arguments = dict(
        order_ptr="*i32", weight_ptr="*i8", scale_ptr="*fp32", out_ptr=f"*{dtype}",
        M="i32", N="i32", K="i32", TILES="i32", first="i32",
    )  # fmt: skip
    constants: dict[str, Any] = dict(ids_ptr=None, HAS_IDS=False, BLOCK=_MANY, RAGGED=False)
    return launch.of_tile(w8a16_rows_kernel, arguments, constants, tile, layout.PAIR)


def unsupported(k: int) -> str:
    """Why a table of K columns cannot run; empty if it can."""
    return ""


def warm_up(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what makes halves of activations, and what looks up rows."""
    tile, *_ = tiles_of(launch.architecture(device), "w8a16", "halves")
    x = torch.zeros(1, k, dtype=dtype, device=device)
    quantize_activation.split_halves(x, tile)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    _rows(zeros(1, k, device), ids, 0, 1, x)


def _w8a16_embedding(
    ids: torch.Tensor,
    weight_bytes: torch.Tensor,
    row_scale: torch.Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(ids.shape[0], k, dtype=dtype, device=ids.device)
    prepared = {"weight_bytes": weight_bytes, "row_scale": row_scale}
    return _rows(prepared, ids.contiguous(), 0, n, out)


_TABLE = "Tensor weight_bytes, Tensor row_scale"
library.define(
    f"w8a16_linear(Tensor x, {_TABLE}, Tensor? bias, int n) -> Tensor",
    launch.op_of("w8a16", ("weight_bytes", "row_scale"), linear),
    lambda x, weight_bytes, row_scale, bias, n: x.new_empty(x.shape[0], n),
)
library.define(
    f"w8a16_embedding(Tensor ids, {_TABLE}, int n, int k, ScalarType dtype) -> Tensor",
    _w8a16_embedding,
    lambda ids, weight_bytes, row_scale, n, k, dtype: row_scale.new_empty(
        ids.shape[0], k, dtype=dtype
    ),
)


def apply(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N] through the op, with the tile of tiles.json."""
    p = prepared
    return torch.ops.qig.w8a16_linear(x, p["weight_bytes"], p["row_scale"], bias, n)


def embedding(
    ids: torch.Tensor, prepared: Prepared, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """ids [M] -> the rows [M, K] in `dtype` through the op."""
    p = prepared
    return torch.ops.qig.w8a16_embedding(ids, p["weight_bytes"], p["row_scale"], n, k, dtype)
