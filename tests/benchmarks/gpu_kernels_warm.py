"""Stage warm: every kernel that is timed later is compiled now, by a process a core.

Triton keeps what it compiles on disk; the process that times finds it there. Each process launches
its share once, on the smallest weights for which Triton makes the same kernel: it compiles
another one where an integer argument is 1 or a multiple of 16, so N, K and the number of layout
tiles have to be like the real ones' in that.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing import get_context
from typing import Any

import torch
from gpu_kernels_plan import RESULTS, Context, Failed

from qig_serve.formats import SCHEMES
from qig_serve.kernels import launch, layout, tiles, tuning, w8a16
from qig_serve.kernels.tiles import Tile

COUNTS = RESULTS / "kernel-counts.json"
SHORTLIST = 6
EVERY = tuple(tiles.LAYER_SHAPES["Qwen2-VL-7B"].values())
"""Shapes for which every candidate is timed: 0.9 s of a core to compile one, 10 ms to time."""
HEAD = tuning.HEAD
HEAD_TILES = tuple(
    dict.fromkeys(
        tile for m in tuning.BUCKETS for tile in w8a16.candidates(m) if tile.regime == "halves"
    )
)
"""Tried for an output head in 8 bits."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile: of a linear, of the head, or the quantizers of rows of K."""

    kind: str
    """A scheme, "head" or "quantizers"."""
    n: int
    k: int
    tile: Tile | None = None

    def __str__(self) -> str:
        return f"{self.kind} {tuning.compiled_as(self.tile) if self.tile else self.k}"


def shapes() -> list[tuple[int, int]]:
    """(N, K) of every linear, models in their order, the largest of each first."""
    found: dict[tuple[int, int], None] = {}
    for layer in tiles.LAYER_SHAPES.values():
        found |= dict.fromkeys(sorted(layer.values(), key=lambda s: -s[0] * s[1]))
    return list(found)


def specialization(n: int, k: int) -> tuple[bool, ...]:
    """What Triton sees of a linear's sizes, and whether K is whole pairs of groups."""
    numbers = (n, k, layout.padded_rows(n), layout.padded_rows(n) // layout.ROW_TILE)
    return (*(v % 16 == 0 for v in numbers), *(v == 1 for v in numbers), k % layout.PAIR == 0)


def smallest_like(n: int, k: int) -> tuple[int, int]:
    """The smallest weight [N, K] for which the kernels are compiled as for this one."""
    wanted = specialization(n, k)
    offered = (
        (rows, columns)
        for rows in [t * layout.ROW_TILE - r for t in (1, 2, 16) for r in (0, 16, 1)]
        for columns in (layout.PAIR, layout.PAIR + layout.GROUP)
    )
    return next((s for s in offered if specialization(*s) == wanted), (n, k))


def known_counts(target: int) -> tuning.Found:
    """The compiler's figures for a target under this Triton, or under any."""
    import triton

    exact = tuning.read_counts(COUNTS, target, triton.__version__)
    return exact or tuning.read_counts(COUNTS, tuning.ALIKE.get(target, target))


def offered(scheme: str, found: tuning.Found, target: int, m: int, n: int, k: int) -> list[Tile]:
    """Tiles to time for M tokens: the model of time's shortlist, the present one, cuBLAS's.

    cuBLAS's: dequantize, which no fused kernel may be slower than. In slices only what is large.
    """
    architecture = tiles.architecture_of((target // 10, target % 10))
    assert architecture is not None
    if (n, k) in EVERY:
        listed = [t for t in tuning.candidates(scheme, m) if t.regime != "dequantize"]
    elif found:
        listed = tuning.shortlist(SCHEMES[scheme], found, target, m, n, k, SHORTLIST)
    else:
        listed = []
    present = tiles.select(scheme, architecture, n, k, m)
    through_cublas = [
        tile
        for tile in tuning.candidates(scheme, m)
        if tile.regime == "dequantize"
        and (not tile.block_n or (m >= 1024 and n > 2 * tile.block_n))
    ]
    return list(dict.fromkeys([*listed, present, *through_cublas]))


def jobs(target: int, found: tuning.Found) -> list[Job]:
    """What the later stages launch, each kernel once, those that take longest to compile first."""
    wanted: dict[Any, Job] = {}
    for n, k in shapes():
        small = smallest_like(n, k)
        for scheme in ("w3a16", "w4a8"):
            for m in tuning.BUCKETS:
                for tile in offered(scheme, found, target, m, n, k):
                    name = tuning.compiled_as(tile)
                    if tile.regime == "dequantize":
                        name = tile.regime
                    wanted.setdefault(
                        (scheme, name, specialization(n, k)), Job(scheme, *small, tile)
                    )
    for tile in HEAD_TILES:
        wanted["head", tuning.compiled_as(tile)] = Job("head", *smallest_like(*HEAD), tile)
    for k in sorted({k for _, k in shapes()}):
        wanted["quantizers", k] = Job("quantizers", 0, k)

    def longest_first(job: Job) -> int:
        return -job.tile.block_m * job.tile.block_n if job.tile else 0

    return sorted(wanted.values(), key=longest_first)


def compile_one(job: Job) -> tuple[str, float, str]:
    """In a process of the pool: (job, seconds, error or nothing)."""
    begun = time.monotonic()
    try:
        launch_one(job, torch.device("cuda", 0))
        torch.cuda.synchronize()
        reason = ""
    except Exception as error:  # whatever a compiler raises, the other jobs go on
        reason = f"{type(error).__name__}: {error}"[:200]
    return str(job), time.monotonic() - begun, reason


def launch_one(job: Job, device: torch.device) -> None:
    """What compiles a job's kernel, if it is not compiled yet."""
    import gpu_kernels_bench as bench

    from qig_serve.kernels import halves, ops, quantize_activation

    if job.kind == "quantizers":
        for m in (1, quantize_activation.MANY_TOKENS):
            for call in bench.quantizers(m, job.k, device).values():
                call()
        return
    assert job.tile is not None
    m = job.tile.block_m
    x = torch.ones(m, job.k, dtype=bench.DTYPE, device=device)
    if job.kind == "head":
        codes = torch.ones(job.n, job.k, dtype=torch.int8, device=device)
        scale = torch.ones(job.n, 1, device=device)
        head = layout.repack_w8a16(codes, scale, launch.orders(device).activations)
        halves.product(
            *quantize_activation.split_halves(x), head["weight_bytes"], head["row_scale"], None,
            job.n, bench.DTYPE, job.tile, launch.scratch_for(job.tile, device),
        )  # fmt: skip
    else:
        zeros = ops.KERNELS[job.kind].zeros(job.n, job.k, device)
        bench.gemm(job.kind, x, job.n, job.tile)(zeros)


def run(context: Context) -> None:
    """Compile; what failed is named, and costs the later stages only its own row."""
    major, minor = torch.cuda.get_device_capability()
    target = major * 10 + minor
    wanted = jobs(target, known_counts(target))
    processes = max(1, min(len(wanted), (os.cpu_count() or 2) - 1))
    begun, done = time.monotonic(), []
    with get_context("spawn").Pool(processes) as pool:
        left = pool.imap_unordered(compile_one, wanted)
        for _ in wanted:
            try:
                done.append(left.next(timeout=max(0.1, context.left() - 2)))  # type: ignore[attr-defined]
            except PoolTimeout:  # the rest is compiled when it is timed
                break
    failed = {name: reason for name, _, reason in done if reason}
    context.results.write(
        "warm",
        {
            "kernels": len(wanted), "compiled": len(done) - len(failed), "processes": processes,
            "seconds": round(time.monotonic() - begun, 1),
            "process_seconds": round(sum(seconds for _, seconds, _ in done), 1),
            "slowest": max(done, key=lambda d: d[1])[:2] if done else None, "failed": failed,
        },
    )  # fmt: skip
    print(
        f"{len(done) - len(failed)} of {len(wanted)} kernels by {processes} processes", flush=True
    )
    if len(done) < len(wanted):
        raise Failed(
            f"{len(wanted) - len(done)} of {len(wanted)} kernels were not compiled in time"
        )
    if failed:
        raise Failed(f"{len(failed)} kernels do not compile: {', '.join(failed)}"[:300])
