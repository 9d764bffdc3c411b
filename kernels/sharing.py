"""What the kernels' programs share: order of tiles, equal shares of work, partial sums.

Equal shares. A linear is output tiles * K / 128 units of work, numbered tile by tile, of which
each program takes as many as any other, one after the other. A program that has a whole tile
stores it. A tile that several programs share goes through the scratch memory: each leaves its
partial sum there, the last to arrive adds them up in the order of K and stores. So the result
depends neither on which program was last nor on the other tokens.

    halves, split_k   So many programs per tile that no share crosses one: few registers, so many
                      programs per SM. Partial sums are small, so K may be split a few times more
                      than needed, until every SM has as much to do (`programs`).
    stream_k          As many programs as fit on the device, and shares cross tiles (Osama et al.,
                      arXiv 2301.03598): every SM has the same, with two partial sums per program at
                      most.

All of it is 32-bit arithmetic: 64-bit divisions at a kernel's start cost 2 us.

Measured on an H200 (tests/benchmarks/results/kernels-H200-0af20ff.json), and why tiles are as they
are:

  - Tiles of 64 rows: with twice as many programs on an SM, w4a8's four linears of Qwen2-VL-7B take
    60 us where tiles of 128 rows take 82 (64 tokens).
  - `Tile.early`, programmatic dependent launch, with the first weights fetched into L2: small
    layers gain up to 1 us, and large ones lose as much to what is fetched twice. tiles.json says
    which.
  - Parts of a tile are read eight at a time, since each read takes as long as L2 does.
  - Lost: K divided among the warps of a program by a product over a leading axis, without partial
    sums in memory. It was 0 to 0.4 us ahead in w4a8's qkv and o, and behind everywhere else (1.1 to
    1.4 times the time for 4 tokens)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def load_tokens(ptrs: tl.tensor, in_range: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """x [K block, COLUMNS] at ptrs, whose rows past M are row M - 1 again; they are never stored.

    A narrow tile does not read them: at M = 1 they would add a third to the bytes that reach an
    SM. A wide one does, rather than spend 0.1 integer instructions per weight on masks.
    """
    if COLUMNS < 64:
        return tl.load(ptrs, mask=in_range, other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_inputs(
    ptrs: tl.tensor,
    in_range: tl.tensor,
    left: tl.tensor,
    BLOCK_M: tl.constexpr,
    RAGGED: tl.constexpr,
) -> tl.tensor:
    """x [64, BLOCK_M] at ptrs, of rows that have `left` more inputs: zeros behind them."""
    if RAGGED:
        return tl.load(ptrs, mask=in_range & (tl.arange(0, 64) < left)[:, None], other=0)
    else:
        return load_tokens(ptrs, in_range, BLOCK_M)


@triton.jit
def start_early(weights: tl.tensor, PDL: tl.constexpr, FETCH: tl.constexpr) -> None:
    """Programmatic dependent launch: what need not wait for the kernel before, then the wait.

    weights: pointers to the first that are read, one a 128-byte line; with FETCH they are brought
    into L2. Nothing that another kernel writes may be read before: activations, scratch. Without
    PDL nothing happens here.
    """
    if PDL:
        if FETCH:
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weights],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def share(
    blocks: tl.tensor, size: tl.tensor, rest: tl.tensor, ALIGNED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """This program's units: first, and the one past the last; size and rest: shares' below.

    No number here exceeds the units of a launch, and nothing is divided by more than `size`.
    """
    program = tl.program_id(0)
    if ALIGNED:  # `size` programs per tile
        start = program // size * blocks
        part = program % size
        return start + part * blocks // size, start + (part + 1) * blocks // size
    else:  # `size` units each, and one more for the first `rest` programs
        first = program * size + tl.minimum(program, rest)
        return first, first + size + (program < rest).to(tl.int32)


@triton.jit
def _program_of(unit: tl.tensor, size: tl.tensor, rest: tl.tensor) -> tl.tensor:
    """Whose share a unit is in, where shares are not aligned."""
    larger = rest * (size + 1)
    if unit < larger:
        program = unit // (size + 1)
    else:
        program = rest + (unit - larger) // size
    return program


@triton.jit
def leave_part(
    acc: tl.tensor, partials_ptr: tl.tensor, counter_ptr: tl.tensor, tile: tl.tensor,
    blocks: tl.tensor, size: tl.tensor, rest: tl.tensor, starts_tile: tl.tensor, tokens: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Store this program's part [BLOCK_N, BLOCK_M] of an output tile in the scratch memory.

    One tile [BLOCK_M, BLOCK_N] per program; where shares cross tiles two: of a tile that it begins
    (`starts_tile`), and of one that it does not. tokens: how many of BLOCK_M count. -> (whether all
    parts are there now, where the first and the last of them lie).
    """
    place = tl.program_id(0)
    if ALIGNED:
        first, last = tile * size, tile * size + size - 1
        parts = size - 1
    else:
        first = _program_of(tile * blocks, size, rest)
        last = _program_of(tile * blocks + blocks - 1, size, rest)
        parts = last - first
        place = place * 2 + starts_tile.to(tl.int32)
        first, last = first * 2 + 1, last * 2  # the first program's part begins the tile
    mine = partials_ptr + place * (BLOCK_N * BLOCK_M)
    token = tl.arange(0, BLOCK_M)[None, :]
    mine += token * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(mine, acc, mask=token < tokens)
    tl.debug_barrier()  # all of this program's stores before the counter says so
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
    complete = arrived == parts
    if complete:
        tl.store(counter_ptr + tile, 0)  # ready for the next launch
    return complete, first, last


@triton.jit
def add_parts(
    partials_ptr: tl.tensor, first: tl.tensor, last: tl.tensor, start: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum of a tile's parts for tokens start...: [BLOCK_N, TOKENS]; first, last: leave_part's.

    In one order, whoever adds; eight parts are on their way at a time, since each takes as long as
    L2 does, of a few tokens, in few registers.
    """
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    STEP: tl.constexpr = 1 if ALIGNED else 2
    where = partials_ptr + (start + tl.arange(0, TOKENS))[None, :] * BLOCK_N
    where += tl.arange(0, BLOCK_N)[:, None]
    total = _part_at(where, first, last, SIZE)
    for place in tl.range(first + 1, last + 1, 8 * STEP):
        p0 = _part_at(where, place, last, SIZE)
        p1 = _part_at(where, place + STEP, last, SIZE)
        p2 = _part_at(where, place + 2 * STEP, last, SIZE)
        p3 = _part_at(where, place + 3 * STEP, last, SIZE)
        p4 = _part_at(where, place + 4 * STEP, last, SIZE)
        p5 = _part_at(where, place + 5 * STEP, last, SIZE)
        p6 = _part_at(where, place + 6 * STEP, last, SIZE)
        p7 = _part_at(where, place + 7 * STEP, last, SIZE)
        total += ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))
    return total


@triton.jit
def _part_at(where: tl.tensor, place: tl.tensor, last: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """A part, or zeros beyond the last; past L1, where another program's would not be seen."""
    there = tl.full([1, 1], place, tl.int32) <= last
    return tl.load(where + place * SIZE, mask=there, other=0, cache_modifier=".cg")


@triton.jit
def store_out(
    out_ptr: tl.tensor, out: tl.tensor, bias_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor,
    M: tl.tensor, N: tl.tensor, HAS_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """out fp32 [rows, tokens] -> [M, N], bias added before rounding."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0)
        out += bias.to(tl.float32)[:, None]
    where = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = (tokens < M)[None, :] & (rows < N)[:, None]
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=mask)
