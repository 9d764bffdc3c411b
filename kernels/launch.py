"""Launches: what is compiled, for which device, by how many programs, with what scratch memory.

How the programs of a launch divide its work is sharing.py's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from qig_serve.kernels import library
from qig_serve.kernels.layout import GROUP
from qig_serve.kernels.tiles import SHARED, Tile, architecture_of, select, tile_table

INTERPRETER_ARCHITECTURE = "sm_80"  # whose tiles are taken where there is no GPU
_INTERPRETER_SMS = 4  # stands in for a GPU's multiprocessors, so that K is split there too
MOST_TILES = 1 << 16
"""Most output tiles that programs may share: each needs a counter."""
_UNEVEN = 1.07  # an SM's work against the mean, from which K is split once more
_MOST_PER_SM = 8  # programs of a split launch; bounds the scratch memory


@dataclass(frozen=True)
class Kernel:
    """A kernel as some launch compiles it: for compile_report.py and time_model.py."""

    function: Any
    arguments: dict[str, str]
    """Types of the arguments that are no constants."""
    constants: dict[str, Any]
    options: dict[str, Any]
    """The compiler's."""
    inputs: int
    """Inputs along K that a step of the main loop takes."""
    tile: Tile = field(default_factory=lambda: Tile("prefill"))
    """Of a linear."""

    @property
    def warps(self) -> int:
        """Of a program."""
        return int(self.options["num_warps"])

    @property
    def name(self) -> str:
        """Of the function, without `_kernel`."""
        return str(self.function.__name__).removesuffix("_kernel")


def of_tile(
    function: Any, arguments: dict[str, str], constants: dict[str, Any], tile: Tile, inputs: int
) -> Kernel:
    """The kernel of a linear's launch with a tile."""
    if "FETCH" in function.arg_names:
        constants["FETCH"] = tile.early > 0
    return Kernel(function, arguments, constants, compiler_options(tile), inputs, tile)


def of_linear(
    prefill: Any,
    shared: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    tile: Tile,
    sums: str,
) -> Kernel:
    """The kernel of a linear's launch with a prefill, split_k or stream_k tile, see `run`.

    arguments, constants: what both kernels have beside what `run` adds; sums: the type of partial
    sums.
    """
    constants |= dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, HAS_BIAS=True,
        USE_PTX=True,
    )  # fmt: skip
    if tile.regime == "prefill":
        return of_tile(prefill, arguments, constants | {"GROUP_M": tile.group_m}, tile, GROUP)
    arguments |= dict(
        partials_ptr=f"*{sums}", counter_ptr="*i32", tiles_m="i32", size="i32", rest="i32"
    )
    aligned = tile.regime == "split_k"
    return of_tile(shared, arguments, constants | {"ALIGNED": aligned}, tile, GROUP)


@dataclass(frozen=True)
class Orders:
    """The orders of inputs (layout.ORDERS) that a device's tensor cores read without a move."""

    weights: int
    """Of the bytes of w3a16's planes."""
    activations: int
    """Of x's halves."""
    narrow: int
    """Of x's halves where a product is too narrow for wgmma (`uses_wgmma`)."""

    def of_halves(self, tile: Tile) -> int:
        """Of x's halves for a tile."""
        return self.activations if uses_wgmma(tile) else self.narrow


def uses_wgmma(tile: Tile) -> bool:
    """Whether Triton multiplies halves of a tile with wgmma, on Hopper, or with mma.sync."""
    return tile.num_warps % 4 == 0 and tile.block_n >= 64 and tile.block_m >= 8


def orders_of(capability: tuple[int, int]) -> Orders:
    """wgmma (9.0) against mma.sync, whose operands Triton 3.8 lays out otherwise than 3.7."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    eight_neighbours = (major, minor) < (3, 8)
    if capability[0] == 9:
        return Orders(16, 16, 8 if eight_neighbours else 16)
    x = 4 if eight_neighbours else 32
    return Orders(32, x, x)


def orders_for(target: int) -> Orders:
    """The same of a compute capability as a number, 90 for 9.0."""
    return orders_of((target // 10, target % 10))


@functools.cache
def orders(device: torch.device) -> Orders:
    """Those of a device; under the interpreter those of INTERPRETER_ARCHITECTURE."""
    if device.type != "cuda":
        return orders_of((8, 0))
    return orders_of(torch.cuda.get_device_capability(device))


FUSED = {"enable_fp_fusion": True}
"""Multiply and add in one instruction, at every launch: Triton 3.10 changes the default, which bit
for bit equal results of two kernels must not hang on."""


def compiler_options(tile: Tile) -> dict[str, Any]:
    """Warps, and registers that leave room for as many programs per SM as the work is divided for.

    Left alone the compiler takes more registers than it needs, and fewer programs fit.
    """
    options: dict[str, Any] = {"num_warps": tile.num_warps, **FUSED}
    if tile.regime in SHARED:
        options["maxnreg"] = min(
            255, 65536 // (32 * tile.num_warps * tile.programs_per_sm) // 8 * 8
        )
    return options


def options(tile: Tile, device: torch.device) -> dict[str, Any]:
    """Compiler options and constants of a launch. Pipelining is the loop's own (tl.range)."""
    start = early(device) if tile.early >= 0 else {}
    return {**compiler_options(tile), "PDL": False, "FETCH": tile.early > 0, **start}


@functools.cache
def early(device: torch.device) -> dict[str, Any]:
    """Options of a launch that may start before the kernel before it has ended (Hopper on)."""
    return {"PDL": True, "launch_pdl": True} if has_early_launch(device) else {}


def indexed(device: torch.device) -> torch.device:
    """With its index: "cuda" and "cuda:0" are one device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def has_early_launch(device: torch.device) -> bool:
    """Whether kernels may start before the one before them has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def architecture(device: torch.device) -> str:
    """Whose tiles of tiles.json a device takes; RuntimeError if none fit."""
    if device.type != "cuda":
        return INTERPRETER_ARCHITECTURE
    capability = torch.cuda.get_device_capability(device)
    found = architecture_of(capability)
    if found is None:
        raise RuntimeError(f"no kernel tiles for compute capability {capability}")
    return found


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(tile: Tile, output_tiles: int, blocks: int, sms: int) -> int:
    """How many programs share the `output_tiles * blocks` units of a launch.

    stream_k: as many as fit. halves, split_k: a multiple of the output tiles, about as many as fit,
    or more, until no SM is much longer at work than another.
    """
    units, slots = output_tiles * blocks, sms * tile.programs_per_sm
    if tile.regime == "stream_k" and output_tiles <= MOST_TILES:
        return min(slots, units)
    most = min(blocks, max(slots, sms * _MOST_PER_SM) // output_tiles)
    if tile.regime == "stream_k" or output_tiles > MOST_TILES or most <= 1:
        return output_tiles  # a tile each: no counters

    def longest(splits: int) -> float:  # of an SM's work, in units of a mean SM's
        count = output_tiles * splits
        return -(-count // sms) * sms / count

    offered = range(max(1, min(most, slots // output_tiles)), most + 1)
    even = (splits for splits in offered if longest(splits) < _UNEVEN)
    return output_tiles * next(even, min(offered, key=longest))


def shares(count: int, output_tiles: int, blocks: int, aligned: bool) -> tuple[int, int]:
    """`size` and `rest` of `share`, for `count` programs."""
    if aligned:
        return count // output_tiles, 0
    return divmod(output_tiles * blocks, count)


@dataclass(frozen=True)
class Scratch:
    """Memory that every linear on a device shares: launches follow one another on a stream."""

    partials: torch.Tensor
    """int32: partial sums of 4 bytes, two tiles per program."""
    counters: torch.Tensor
    """int32 zeros, one an output tile; every launch leaves them at zero."""

    def partial_sums(
        self, tile: Tile, count: int, output_tiles: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """For `count` programs, in a 4-byte dtype; ValueError if they do not fit.

        As many programs as output tiles have a whole one each, and no partial sums.
        """
        wanted = _places(tile, count) * tile.block_m * tile.block_n
        if count != output_tiles and wanted > self.partials.numel():
            held = self.partials.numel()
            raise ValueError(f"{wanted} partial sums do not fit scratch memory for {held}")
        return self.partials.view(dtype)


def run(
    prefill: Any,
    shared: Any,
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, int, int, int],
    rows: int,
    tile: Tile,
    scratch: Scratch,
    sums: torch.dtype,
    **constants: Any,
) -> None:
    """Launch a scheme's kernel for a prefill, split_k or stream_k tile.

    tensors: activations first, then what the kernels take up to `out`; sizes: M, N, K and the size
    of the weight's layout that they take; rows: of the weight, padded; sums: dtype of partial
    sums."""
    activations = tensors[0]
    assert activations is not None
    device, (m, _, k, _) = activations.device, sizes
    tiles_m = triton.cdiv(m, tile.block_m)
    output_tiles = tiles_m * triton.cdiv(rows, tile.block_n)
    constants |= dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages)
    constants |= options(tile, device)
    if tile.regime == "prefill":
        prefill[(output_tiles,)](*tensors, *sizes, GROUP_M=tile.group_m, **constants)
        return
    blocks, aligned = triton.cdiv(k, GROUP), tile.regime == "split_k"
    count = programs(tile, output_tiles, blocks, multiprocessors(device))
    partials = scratch.partial_sums(tile, count, output_tiles, sums)
    shared[(count,)](
        *tensors, partials, scratch.counters, *sizes, tiles_m,
        *shares(count, output_tiles, blocks, aligned), ALIGNED=aligned, **constants,
    )  # fmt: skip


def op_of(
    scheme: str, names: tuple[str, str], linear: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A scheme's `linear` as an op, with the tile of tiles.json.

    The op takes x [M, K], the prepared tensors of those names, bias [N] or None, N: [M, N].
    """

    def op(
        x: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
    ) -> torch.Tensor:
        m, k = x.shape
        if m == 0:
            return x.new_empty(0, n)
        tile = select(scheme, architecture(x.device), n, k, m)
        prepared = dict(zip(names, (first, second), strict=True))
        x, memory = library.aligned(x), scratch(x.device)
        return linear(x, prepared, n, bias, tile, memory, library.use_ptx(x))

    return op


def _places(tile: Tile, count: int) -> int:
    """Partial tiles of `count` programs (leave_part)."""
    return count * 2 if tile.regime == "stream_k" else count


def scratch_size(tile: Tile, sms: int) -> int:
    """Partial sums that a launch with the tile can have, whatever N, K and M."""
    if tile.regime not in SHARED:
        return 0
    count = sms * max(tile.programs_per_sm, 0 if tile.regime == "stream_k" else _MOST_PER_SM)
    return _places(tile, count) * tile.block_m * tile.block_n


def scratch_for(tile: Tile, device: torch.device) -> Scratch:
    """Scratch memory that suffices for launches with one tile: for tuning and tests."""
    return allocate(max(1, scratch_size(tile, multiprocessors(device))), device)


def scratch(device: torch.device) -> Scratch:
    """Scratch memory of a device, for whatever tile tiles.json has.

    Allocated at the first call (`prepare`), so that it is there before vLLM profiles memory and
    outside of any CUDA graph's pool.
    """
    return scratch_of(indexed(device))


@functools.cache
def scratch_of(device: torch.device) -> Scratch:
    """`scratch` of a device that has its index."""
    name, sms = architecture(device), multiprocessors(device)
    sizes = [
        scratch_size(tile, sms)
        for (of, _, _), rows in tile_table().items()
        if of == name
        for _, tile in rows
    ]
    return allocate(max(sizes), device)


def allocate(size: int, device: torch.device) -> Scratch:
    """Scratch memory for `size` partial sums, and all counters."""
    return Scratch(
        torch.empty(size, dtype=torch.int32, device=device),
        torch.zeros(MOST_TILES, dtype=torch.int32, device=device),
    )
