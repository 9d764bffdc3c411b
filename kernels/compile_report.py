"""Cross-compile the kernels without a GPU and count what came out: a benchmark on any machine.

    python -m qig_serve.kernels.compile_report [--arch 90 ...] [--dtype bf16 fp16] [--json FILE]
    python -m qig_serve.kernels.compile_report --predict [--arch 90]

The first prints, for every kernel and tile of tiles.json: registers, shared memory, spills, the
tensor-core instruction in the PTX, and integer and issued instructions per weight of the main loop
(of a thread's share of the tile's weights). Exit status 1 when a threshold is passed. The second
prints what time_model.py makes of these: microseconds of a layer's linears, and what limits each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

from qig_serve.formats import SCHEMES
from qig_serve.kernels import (
    expert_blocks,
    experts,
    halves,
    launch,
    quantize_activation,
    round_columns,
    time_model,
)
from qig_serve.kernels.launch import Kernel
from qig_serve.kernels.ops import KERNELS
from qig_serve.kernels.sass import SHARED_LIMIT, TARGETS, Counts, count
from qig_serve.kernels.tiles import LAYER_SHAPES, Tile, select, tile_table
from qig_serve.kernels.tuning import HEAD, LEAN, TUNED, issued_per_weight, stored_bits

SHAPE = "Qwen2-VL-7B"
"""Whose layer --predict adds up."""
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)


A_FEW_SPILLS = 10
"""Spill instructions that a kernel may have: tiles that were measured fastest have as many, at an
output tile's end."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target, and what was counted."""

    kernel: str
    scheme: str
    target: int
    dtype: str
    tile: str
    one_token: bool
    """Whether the tile serves a single token."""
    counts: Counts
    integer_per_weight: float | None
    issued_per_weight: float | None

    def problems(self) -> list[str]:
        """What is wrong with a tuned kernel, in words."""
        found, counts = [], self.counts
        where = f"{self.kernel} {self.dtype} sm_{self.target} {self.tile}"
        if counts.spills > A_FEW_SPILLS:
            found.append(f"{where}: {counts.spills} spill instructions, {counts.stack} B stack")
        if counts.shared > SHARED_LIMIT[self.target]:
            found.append(f"{where}: {counts.shared} B shared of {SHARED_LIMIT[self.target]}")
        if self.issued_per_weight is not None:
            if not counts.tensor_core:
                found.append(f"{where}: no tensor-core instruction")
            most = LEAN.get(self.scheme)
            if self.one_token and most is not None and self.issued_per_weight > most + 0.005:
                found.append(f"{where}: {self.issued_per_weight:.2f} issued per weight > {most}")
        return found


def describe(tile: Tile) -> str:
    """A tile in a table."""
    if tile.regime == "dequantize":
        return "128x128 4w"
    shape = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
    return shape if tile.regime == "prefill" else f"{shape} {tile.programs_per_sm}p"


def compile_tile(
    scheme: str, target: int, tile: Tile, dtype: str = "bf16", use_ptx: bool = True, m: int = 0
) -> Compiled:
    """Compile the kernel of a tile for a target (80, ...) and count; m: fewest tokens it serves."""
    kernel = KERNELS[scheme].kernel(tile, dtype, launch.orders_for(target))
    return compile_kernel(kernel, scheme, target, dtype, use_ptx, m)


def compile_kernel(
    kernel: Kernel, scheme: str, target: int, dtype: str, use_ptx: bool, m: int
) -> Compiled:
    """Compiles any kernel; m: the fewest tokens that it serves."""
    tile = kernel.tile
    if "USE_PTX" in kernel.function.arg_names:  # the rows of a table are bytes
        kernel.constants["USE_PTX"] = use_ptx
    counts = count(kernel, target)
    weights = kernel.inputs * tile.block_n / (32 * kernel.warps)
    loops = tile.regime != "dequantize"
    return Compiled(
        kernel=kernel.name,
        scheme=scheme,
        target=target,
        dtype=dtype,
        tile=describe(tile),
        one_token=m == 1,
        counts=counts,
        integer_per_weight=counts.integer / weights if loops else None,
        issued_per_weight=issued_per_weight(kernel, counts) if loops else None,
    )


def tuned_tiles(target: int) -> Iterator[tuple[str, Tile, int]]:
    """(scheme, tile, fewest tokens) of every distinct tile of an architecture in tiles.json."""
    seen = set()
    for (architecture, scheme, _), rows in tile_table().items():
        m = 1
        for most, tile in rows:
            key = (scheme, describe(tile), tile.regime, m == 1)
            if architecture == f"sm_{target}" and key not in seen:
                seen.add(key)
                yield scheme, tile, m
            m = int(most) + 1 if most != float("inf") else m


def report(targets: Iterable[int], dtypes: Iterable[str] = ("bf16", "fp16")) -> Iterator[Compiled]:
    """Every kernel and tuned tile, target by target."""
    for target in targets:
        for dtype in dtypes:
            for scheme, tile, m in tuned_tiles(target):
                yield compile_tile(scheme, target, tile, dtype, m=m)
            eight = halves.kernel(EIGHT_BITS, dtype, launch.orders_for(target).activations, bits=8)
            yield compile_kernel(eight, "8 bits", target, dtype, True, 0)
            for scheme in experts.TILES:
                for kernel in experts.kernels(scheme, dtype, launch.orders_for(target)):
                    fewest = int(kernel.tile == experts.TILES[scheme][0][1])
                    yield compile_kernel(kernel, scheme, target, dtype, True, fewest)
            others = quantize_activation.kernels(dtype, launch.orders_for(target).activations)
            for kernel in others + expert_blocks.kernels(dtype, EXPERTS, TOP_K):
                yield _of_no_linear(kernel, target, dtype)
        for symmetric in (False, True):
            yield _of_no_linear(round_columns.kernel(symmetric), target, "fp32")


def _of_no_linear(kernel: Kernel, target: int, dtype: str) -> Compiled:
    counts, row_ = count(kernel, target), f"{kernel.inputs} {kernel.warps}w"
    return Compiled(kernel.name, "-", target, dtype, row_, False, counts, None, None)


EIGHT_BITS = Tile("halves", 8, 128, 4, 2, programs_per_sm=3)
"""The tile of 8-bit weights (an output head) for few tokens."""
EXPERTS, TOP_K = 128, 8
"""Of Qwen3-VL-30B-A3B: what sorting and adding up slots is compiled for."""

_HEADER = (
    f"{'kernel':<20}{'scheme':<7}{'target':<8}{'dtype':<6}{'tile':<18}{'regs':>5}{'shared':>8}"
    f"{'spills':>7}{'int/w':>7}{'issued/w':>9}  tensor core"
)


def row(c: Compiled) -> str:
    """A line of the table."""
    per_weight = " " * 16
    if c.integer_per_weight is not None and c.issued_per_weight is not None:
        per_weight = f"{c.integer_per_weight:>7.2f}{c.issued_per_weight:>9.2f}"
    return (
        f"{c.kernel:<20}{c.scheme:<7}{'sm_' + str(c.target):<8}{c.dtype:<6}{c.tile:<18}"
        f"{c.counts.registers:>5}{c.counts.shared:>8}{c.counts.spills:>7}{per_weight}"
        f"  {c.counts.tensor_core}"
    )


@dataclass(frozen=True)
class Predicted:
    """A linear by the model of time."""

    scheme: str
    m: int
    layer: str
    tile: str
    microseconds: float
    limit: str
    cublas: float


@cache
def _counts(scheme: str, tile: Tile, target: int) -> Counts:
    return count(KERNELS[scheme].kernel(tile, "bf16", launch.orders_for(target)), target)


def predict(target: int, scheme: str, m: int) -> list[Predicted]:
    """SHAPE's linears of a layer, or of w8a16 its head, with the tiles of tiles.json."""
    gpu, found = time_model.GPUS[target], []
    shapes = LAYER_SHAPES[SHAPE] if SCHEMES[scheme].servable else {"head": HEAD}
    for layer, (n, k) in shapes.items():
        tile = select(scheme, f"sm_{target}", n, k, m)
        reference = time_model.cublas(m, n, k, gpu)
        if tile.regime == "dequantize":
            time, limit = time_model.dequantize(n, k, gpu) + reference, "cuBLAS"
        else:
            kernel = KERNELS[scheme].kernel(tile, "bf16", launch.orders_for(target))
            work = time_model.work(kernel, stored_bits(SCHEMES[scheme]), m, n, k, gpu.sms)
            made = time_model.predict(work, _counts(scheme, tile, target), gpu)
            time, limit = made.microseconds, made.limit
        where = f"{tile.regime} {describe(tile)}"
        found.append(Predicted(scheme, m, layer, where, time, limit, reference))
    return found


def print_predictions(targets: Iterable[int]) -> list[dict[str, Any]]:
    """Print a table per architecture; what it was made of."""
    every: list[dict[str, Any]] = []
    for target in targets:
        print(f"\nsm_{target} ({time_model.GPUS[target].name}): us, sum of {SHAPE}'s four linears,")
        print("x: of cuBLAS in bf16; activation quantization not counted")
        print("head: the output head beside it, in bf16 by cuBLAS and in 8 bits")
        columns = "".join(f"{scheme:>8}{'x':>6}" for scheme in TUNED)
        print(f"{'M':>6}{'cuBLAS':>8}{columns}{'head':>8}{'w8a16':>8}  gate_up: tile, limit")
        for m in TOKENS:
            rows = {scheme: predict(target, scheme, m) for scheme in KERNELS}
            every += [{"target": target, **asdict(p)} for ps in rows.values() for p in ps]
            reference = sum(p.cublas for p in rows["w3a16"])
            line = f"{m:>6}{reference:>8.0f}"
            for scheme in TUNED:
                total = sum(p.microseconds for p in rows[scheme])
                line += f"{total:>8.0f}{reference / total:>6.2f}"
            (head,) = rows["w8a16"]
            line += f"{head.cublas:>8.0f}{head.microseconds:>8.0f}"
            shown = [next(p for p in rows[s] if p.layer == "gate_up") for s in TUNED]
            print(line + "  " + "; ".join(f"{p.tile}, {p.limit}" for p in shown), flush=True)
    return every


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a threshold was passed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="qig_serve.kernels.compile_report")
    parser.add_argument("--arch", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=("bf16", "fp16"))
    parser.add_argument("--predict", action="store_true", help="times by time_model.py instead")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    print(f"Triton {triton.__version__}")
    figures: list[dict[str, Any]]
    problems: list[str] = []
    if options.predict:
        figures = print_predictions(options.arch)
    else:
        print(_HEADER)
        compiled = []
        for one in report(options.arch, options.dtype):
            print(row(one), flush=True)
            compiled.append(one)
        figures = [asdict(c) for c in compiled]
        problems = [problem for one in compiled for problem in one.problems()]
        print("\n".join(problems) if problems else "no threshold passed")
    if options.json:
        text = json.dumps({"triton": triton.__version__, "kernels": figures}, indent=1)
        options.json.write_text(text + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
