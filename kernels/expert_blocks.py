"""Which tokens an expert has: slots sorted by expert, in blocks; and the sum of a token's experts.

A slot is a (token, choice): slot = token * top_k + choice. The grouped kernels (experts.py) have
tiles of BLOCK_M slots of one expert, so slots are sorted by expert and cut into blocks:

    ids     [M, top_k]      expert of a slot, -1 where another rank has it
    slots   int32 [S]       slots by expert, in the order of tokens; S = M * top_k
    table   int32 [B, 3]    of a block its expert (-1: no block), the first place in `slots`, and
                            the one past its expert's last

Everything is done on the device in one launch, one program per expert: each counts all slots (a
histogram), so that it knows where its own begin without waiting for others. B is the most blocks
that S slots can have (`most_blocks`), which is what the grouped kernels' grid is made for: no
number of blocks comes back to the host, and a CUDA graph holds whatever the router chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch, sharing
from qig_serve.kernels.launch import Kernel

CHUNK = 1024
"""Slots that a program reads at a time, and columns that one of the sum has."""
_LEAST_BINS = 32


@triton.jit
def _expert_of(ids_ptr, slot, SLOTS, BINS: tl.constexpr):
    """Experts of slots; the last bin for what is of no expert here."""
    ids = tl.load(ids_ptr + slot, mask=slot < SLOTS, other=-1)
    return tl.where(ids < 0, BINS - 1, ids)


@triton.jit(do_not_specialize=["SLOTS", "BLOCKS"])
def sort_slots_kernel(
    ids_ptr, slots_ptr, table_ptr, SLOTS, BLOCKS, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (experts,); BINS: a power of two above their number."""
    sharing.start_early(ids_ptr, PDL, False)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for first in range(0, SLOTS, CHUNK):
        counts += tl.histogram(_expert_of(ids_ptr, first + lane, SLOTS, BINS), BINS)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    start = tl.sum(tl.where(bins < expert, counts, 0), 0)
    last = start + tl.sum(tl.where(bins == expert, counts, 0), 0)
    first_block = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    mine = (last - start + BLOCK_M - 1) // BLOCK_M
    for first in range(0, mine, CHUNK):
        block = first + lane
        row = table_ptr + (first_block + block) * 3
        tl.store(row, expert + block * 0, mask=block < mine)
        tl.store(row + 1, start + block * BLOCK_M, mask=block < mine)
        tl.store(row + 2, last + block * 0, mask=block < mine)
    if expert == tl.num_programs(0) - 1:  # the blocks that there are not
        for first in range(first_block + mine, BLOCKS, CHUNK):
            block = first + lane
            tl.store(table_ptr + block * 3, -1 + block * 0, mask=block < BLOCKS)
    place = start
    for first in range(0, SLOTS, CHUNK):
        slot = first + lane
        is_mine = (_expert_of(ids_ptr, slot, SLOTS, BINS) == expert).to(tl.int32)
        before = tl.cumsum(is_mine, 0) - is_mine
        tl.store(slots_ptr + place + before, slot, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)


@triton.jit
def sum_slots_kernel(
    parts_ptr, ids_ptr, out_ptr, N, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, chunks of columns): parts [M, TOP_K, N] -> out [M, N], in fp32, rounded once.

    What is of no expert here was never written, and is not read.
    """
    sharing.start_early(ids_ptr, PDL, False)
    slot = tl.program_id(0).to(tl.int64) * TOP_K
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(TOP_K):
        here = tl.where(tl.load(ids_ptr + slot + i) >= 0, N, 0)
        part = tl.load(parts_ptr + (slot + i) * N + columns, mask=columns < here, other=0)
        total += part.to(tl.float32)
    where = out_ptr + tl.program_id(0).to(tl.int64) * N + columns
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def block_of(
    table_ptr, slots_ptr, block, lane, M, SLOTS, TOP_K: tl.constexpr
):  # fmt: skip
    """Of lanes of a block: slots (SLOTS where the expert has no more), and their rows of x (M)."""
    place = tl.load(table_ptr + block * 3 + 1) + lane
    slots = tl.load(slots_ptr + place, mask=place < tl.load(table_ptr + block * 3 + 2), other=SLOTS)
    return slots, tl.where(slots < SLOTS, slots // TOP_K, M)


@dataclass(frozen=True)
class Blocks:
    """Slots in blocks of BLOCK_M, as the head of this file has them."""

    slots: torch.Tensor
    table: torch.Tensor


def most_blocks(slots: int, experts: int, block_m: int) -> int:
    """Blocks that `slots` slots have at most: all but one of an expert's are full."""
    used = min(slots, experts)
    return used + (slots - used) // block_m


def _bins(experts: int) -> int:
    return max(_LEAST_BINS, triton.next_power_of_2(experts + 1))


def sort_slots(ids: torch.Tensor, experts: int, block_m: int) -> Blocks:
    """ids int32 [M, top_k] contiguous, M > 0, of `experts` experts -> their blocks."""
    count, device = ids.numel(), ids.device
    blocks = most_blocks(count, experts, block_m)
    slots = torch.empty(count, dtype=torch.int32, device=device)
    table = torch.empty(blocks, 3, dtype=torch.int32, device=device)
    sort_slots_kernel[(experts,)](
        ids, slots, table, count, blocks, BLOCK_M=block_m, BINS=_bins(experts), CHUNK=CHUNK,
        **launch.FUSED, **launch.early(device),
    )  # fmt: skip
    return Blocks(slots, table)


def sum_slots(parts: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """parts [M * top_k, N], ids int32 [M, top_k] -> [M, N] of parts' dtype."""
    (m, top_k), n = ids.shape, parts.shape[1]
    out = torch.empty(m, n, dtype=parts.dtype, device=parts.device)
    sum_slots_kernel[(m, triton.cdiv(n, CHUNK))](
        parts, ids, out, n, TOP_K=top_k, CHUNK=CHUNK, **launch.FUSED, **launch.early(parts.device)
    )
    return out


def kernels(dtype: str, experts: int, top_k: int) -> list[Kernel]:
    """What launches compile, for `dtype` ("bf16", "fp16")."""
    sort = dict(ids_ptr="*i32", slots_ptr="*i32", table_ptr="*i32", SLOTS="i32", BLOCKS="i32")
    add = dict(parts_ptr=f"*{dtype}", ids_ptr="*i32", out_ptr=f"*{dtype}", N="i32")
    constants = {"BLOCK_M": 16, "BINS": _bins(experts), "CHUNK": CHUNK}
    options = {"num_warps": 4, **launch.FUSED}
    return [
        Kernel(sort_slots_kernel, sort, constants, options, CHUNK),
        Kernel(sum_slots_kernel, add, {"TOP_K": top_k, "CHUNK": CHUNK}, options, CHUNK),
    ]
