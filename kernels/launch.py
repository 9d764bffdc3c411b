"""What the launchers of w3a16 and w4a8 share: tile order, split of K, workspace, counters."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels.layout import ROW_TILE
from qig_serve.kernels.tuning import DECODE_ROWS, Tile

_INTERPRETER_SMS = 4  # stands in for a GPU's multiprocessors, so that K is split there too
_SMALLEST_BLOCK_M = 16


@triton.jit
def grouped(
    program: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Program -> (token tile, output tile): GROUP_M token tiles share a column of outputs."""
    in_group = GROUP_M * tiles_n
    first = program // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % in_group % height, program % in_group // height


@triton.jit
def load_tokens(ptrs: tl.tensor, in_range: tl.tensor, BLOCK_M: tl.constexpr) -> tl.tensor:
    """x [128, BLOCK_M] at ptrs, whose rows past M are row M - 1 again; they are never stored.

    A narrow tile does not read them: at M = 1 sixteen times the row would take a quarter of what
    the L2 cache can deliver. A wide one reads them rather than spend 0.1 integer instructions a
    weight on a mask for every load.
    """
    if BLOCK_M < 64:
        return tl.load(ptrs, mask=in_range, other=0)
    else:
        return tl.load(ptrs)


def options(tile: Tile) -> dict[str, Any]:
    """Compiler options of a launch. Pipelining is the loop's own (tl.range)."""
    return {"num_warps": tile.num_warps, "enable_fp_fusion": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_k(tile: Tile, output_tiles: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """(splits, blocks of 128 inputs a split): about tile.programs_per_sm programs an SM."""
    wanted = max(1, multiprocessors(device) * tile.programs_per_sm // output_tiles)
    a_split = -(-blocks // min(wanted, blocks))
    return -(-blocks // a_split), a_split


def workspace(
    splits: int, output_tiles: int, tile: Tile, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Uninitialized partial sums [tile, split, BLOCK_M, BLOCK_N], or None if K is not split.

    From the caching allocator on every call: counted by memory profiling, private to the stream,
    and part of a CUDA graph's own pool under capture.
    """
    if splits == 1:
        return None
    size = (output_tiles, splits, tile.block_m, tile.block_n)
    return torch.empty(size, dtype=dtype, device=device)


def counters(n: int, device: torch.device) -> torch.Tensor:
    """int32 zeros, one an output tile that decode can have for a linear of N outputs."""
    tiles = -(-n // ROW_TILE) * (DECODE_ROWS // _SMALLEST_BLOCK_M)
    return torch.zeros(tiles, dtype=torch.int32, device=device)
