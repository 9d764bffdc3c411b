"""What w3a16 and w4a8 share: tile order, loads of x, split of K, workspace, counters."""

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

    A narrow tile does not read them: at M = 1 they would add a third to the bytes that reach an
    SM. A wide one does, rather than spend 0.1 integer instructions a weight on masks.
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


def workspace_size(tile: Tile, device: torch.device) -> int:
    """Most partial sums (4 bytes each) that a launch with the tile can have, for any N, K and M.

    split_k splits only until there are programs_per_sm programs an SM, and each has one tile.
    """
    if tile.regime != "split_k":
        return 0
    return multiprocessors(device) * tile.programs_per_sm * tile.block_m * tile.block_n


def partial_sums(
    workspace: torch.Tensor, splits: int, output_tiles: int, tile: Tile, dtype: torch.dtype
) -> torch.Tensor | None:
    """[tile, split, BLOCK_M, BLOCK_N] of a 4-byte dtype in the workspace; None if K is not split.

    ValueError if the workspace is too small.
    """
    if splits == 1:
        return None
    wanted = output_tiles * splits * tile.block_m * tile.block_n
    if wanted > workspace.numel():
        raise ValueError(f"{wanted} partial sums do not fit a workspace of {workspace.numel()}")
    return workspace.view(dtype)


def counters(n: int, device: torch.device) -> torch.Tensor:
    """int32 zeros, one an output tile that decode can have for a linear of N outputs."""
    tiles = -(-n // ROW_TILE) * (DECODE_ROWS // _SMALLEST_BLOCK_M)
    return torch.zeros(tiles, dtype=torch.int32, device=device)
