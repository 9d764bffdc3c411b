"""What makes tiles.json: measured on a GPU, or chosen by the model of time where there is none.

    python -m qig_serve.kernels.tuning --predict [--arch 90 ...] [--schemes w8a16] [--counts FILE]
    python -m qig_serve.kernels.tuning [--counts FILE] [--quick]

The first compiles every candidate for the architectures (minutes, no GPU), counts, and writes the
tiles that time_model.py predicts to be fastest. The second measures, on the GPU at hand, the few
that the model puts first, at the layer shapes of tiles.LAYER_SHAPES. --counts keeps the compiler's
figures in a file, so that they are had once.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.kernels import launch, ops, time_model
from qig_serve.kernels.ops import KERNELS
from qig_serve.kernels.sass import SHARED_LIMIT, TARGETS, Counts, count
from qig_serve.kernels.tiles import LAYER_SHAPES, TILES_FILE, Tile, select, tile_table
from qig_serve.packing import pack_linear, scale_dtype

TUNED = [name for name in KERNELS if SCHEMES[name].servable]
"""Schemes of decoder linears, which are timed on a GPU."""
HEAD = (152064, 3584)
"""(N, K) of an output head, Qwen2-VL-7B's."""

BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
"""Largest M of each bucket; the last is without a bound."""
ALIKE = {86: 80, 89: 80}
"""Targets for which the compiler makes nearly the same of a kernel: one is compiled for both."""
LEAN = {"w3a16": 1.5, "w4a8": 1.1}
"""Issued instructions per weight that a tile for FEW tokens may take, where a limit is known: an
H200's memory delivers a weight in the time of 3.2 (w3a16) and 3.9 (w4a8), with every issue slot
taken."""
FEW = 8
_SLICES_FROM = 4096
_WORTH = 0.97  # a shape has tiles of its own where they take less than this of the default's time

Found = dict[str, dict[str, Counts]]
"""Scheme -> what a tile is compiled as (`compiled_as`) -> counts."""


def compiled_as(tile: Tile) -> str:
    """Of tiles with the same name one is compiled: the others differ in launches alone."""
    name = f"{tile.regime} {tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
    name += ("" if tile.early > 0 else " unfetched") if tile.early >= 0 else " late"
    return name if tile.regime == "prefill" else f"{name} {tile.programs_per_sm}p"


def stored_bits(scheme: QuantScheme) -> float:
    """Bits of a weight that the kernels read, scales and zero points included."""
    return scheme.bits + (32 / scheme.group_size if scheme.group_size else 0)


def issued_per_weight(kernel: launch.Kernel, counts: Counts) -> float:
    """Instructions of the main loop for a weight of a thread's share of the tile."""
    return counts.issued * 32 * kernel.warps / (kernel.inputs * kernel.tile.block_n)


def candidates(scheme: str, m: int) -> list[Tile]:
    """What is tried at M tokens."""
    tiles: list[Tile] = KERNELS[scheme].candidates(m)
    return tiles


def shapes_of(scheme: str) -> list[tuple[int, int]]:
    """(N, K) for which a scheme's tiles are chosen."""
    if not SCHEMES[scheme].servable:
        return [HEAD]
    return sorted({shape for layer in LAYER_SHAPES.values() for shape in layer.values()})


def count_candidates(
    target: int, processes: int, known: Found, schemes: Iterable[str] = TUNED
) -> Found:
    """Counts of every candidate for a compute capability; `known` ones are not compiled again."""
    wanted: dict[tuple[str, str], Tile] = {}
    for scheme in schemes:
        for m in BUCKETS:
            for tile in candidates(scheme, m):
                if tile.regime != "dequantize":
                    wanted.setdefault((scheme, compiled_as(tile)), tile)
    missing = {k: t for k, t in wanted.items() if k[1] not in known.get(k[0], {})}
    found: Found = {scheme: dict(tiles) for scheme, tiles in known.items()}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [(scheme, tile, target) for (scheme, _), tile in missing.items()]
        for (scheme, name), counts in zip(missing, pool.map(_count, jobs), strict=True):
            if counts is not None:
                found.setdefault(scheme, {})[name] = counts
    return found


def _count(job: tuple[str, Tile, int]) -> Counts | None:
    """None for what does not compile."""
    scheme, tile, target = job
    orders = launch.orders_for(target)
    try:
        return count(KERNELS[scheme].kernel(tile, "bf16", orders), target)
    except Exception as error:  # whatever a compiler pass raises, the candidate is none
        print(f"{scheme} sm_{target} {compiled_as(tile)}: {type(error).__name__}", file=sys.stderr)
        return None


def predicted(
    scheme: QuantScheme, tile: Tile, found: Found, target: int, m: int, n: int, k: int
) -> float:
    """Microseconds by the model; infinite for what spills, or does not fit or compile."""
    gpu = time_model.GPUS[target]
    if tile.regime == "dequantize":
        time = time_model.dequantize(n, k, gpu) + time_model.cublas(m, n, k, gpu)
        if not tile.block_n:
            return time
        # In slices the scratch is small, and the vendor's kernels end in more part-filled waves.
        worth = m >= _SLICES_FROM and n > 2 * tile.block_n
        return time if worth or not scheme.servable else float("inf")
    counts = found.get(scheme.name, {}).get(compiled_as(tile))
    if counts is None or not counts.tensor_core or counts.spills or counts.stack:
        return float("inf")
    if counts.shared > SHARED_LIMIT[target]:
        return float("inf")
    kernel = KERNELS[scheme.name].kernel(tile, "bf16", launch.orders_for(target))
    if m <= FEW and issued_per_weight(kernel, counts) > LEAN.get(scheme.name, float("inf")):
        return float("inf")
    work = time_model.work(kernel, stored_bits(scheme), m, n, k, gpu.sms)
    fits = time_model.resident(counts, kernel.warps, gpu)
    if tile.regime != "prefill" and tile.programs_per_sm > fits:
        return float("inf")
    return time_model.predict(work, counts, gpu).microseconds


def shortlist(
    scheme: QuantScheme, found: Found, target: int, m: int, n: int, k: int, most: int
) -> list[Tile]:
    """The candidates that the model puts first, the fastest first."""
    timed = [
        (predicted(scheme, tile, found, target, m, n, k), index, tile)
        for index, tile in enumerate(candidates(scheme.name, m))
    ]
    return [tile for time, _, tile in sorted(timed)[:most] if time < float("inf")]


def choose(scheme: QuantScheme, found: Found, target: int) -> dict[str, list[dict[str, Any]]]:
    """tiles.json's part of an architecture and scheme, by the model."""
    shapes = shapes_of(scheme.name)
    rows: dict[str, list[dict[str, Any]]] = {"default": []}
    rows |= {f"{n}x{k}": [] for n, k in shapes}
    for m in BUCKETS:
        times = {
            tile: {s: predicted(scheme, tile, found, target, m, *s) for s in shapes}
            for tile in candidates(scheme.name, m)
        }
        total = {tile: sum(t.values()) for tile, t in times.items()}
        best = min(total, key=lambda tile: total[tile])
        bound = None if m == BUCKETS[-1] else m
        rows["default"].append({"max_m": bound, **asdict(best)})
        for n, k in shapes:
            own = min(times, key=lambda tile: times[tile][n, k])
            better = times[own][n, k] < _WORTH * times[best][n, k]
            rows[f"{n}x{k}"].append({"max_m": bound, **asdict(own if better else best)})
    merged = {shape: merged_rows(tiles) for shape, tiles in rows.items()}
    return {s: r for s, r in merged.items() if s == "default" or r != merged["default"]}


def merged_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring buckets with the same tile are one."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if kept and {**kept[-1], "max_m": row["max_m"]} == row:
            kept.pop()
        kept.append(row)
    return kept


# ---- measuring


def random_linear(
    scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Kernel tensors of a linear with random codes and scales."""
    low, high = scheme.qmin, scheme.qmax + 1
    codes = torch.randint(low, high, (n, k), device=device, dtype=torch.int8)
    if not scheme.symmetric:
        codes = codes.to(torch.uint8)
    groups = (n, scheme.num_groups(k))
    scale = (torch.rand(groups, device=device) * 0.01 + 0.005).to(scale_dtype(scheme, dtype))
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, high, groups, device=device, dtype=torch.uint8)
    return ops.prepare(scheme, pack_linear(codes, scale, zero, scheme, dtype), dtype)


def copies(tensors: dict[str, torch.Tensor], total: float = 4e8) -> list[dict[str, torch.Tensor]]:
    """As many copies of a linear as make `total` bytes: used in turn, none is in the L2 cache."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return [
        tensors,
        *({name: t.clone() for name, t in tensors.items()} for _ in range(int(total / size))),
    ]


def time_microseconds(calls: list[Callable[[], object]]) -> float:
    """Median over five rounds of the calls' mean time, one after the other in a CUDA graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def measure(
    scheme: QuantScheme, n: int, k: int, offered: dict[int, list[Tile]], device: torch.device
) -> list[dict[str, Any]]:
    """The fastest tile of each bucket, of those offered (largest M: tiles; the last unbounded)."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    weights = copies(random_linear(scheme, n, k, torch.bfloat16, device))
    rows: list[dict[str, Any]] = []
    for m, tiles in offered.items():
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        timed: list[tuple[float, Tile]] = []
        for tile in tiles:
            scratch = launch.scratch_for(tile, device)
            calls = [
                functools.partial(ops.run, scheme, x, w, n, None, tile, scratch) for w in weights
            ]
            try:
                timed.append((time_microseconds(list(calls)), tile))
            except (OutOfResources, CompilationError, PTXASError):
                continue
        microseconds, best = min(timed, key=lambda pair: pair[0])
        print(f"{scheme.name} {n}x{k} M={m}: {microseconds:.1f} us {best}", flush=True)
        rows.append({"max_m": None if m == max(offered) else m, **asdict(best)})
    return rows


def read_counts(path: Path | None, target: int, version: str | None = None) -> Found:
    """Of a --counts file; empty without one. Of several Triton versions the worse of each figure.

    version: of that one alone.
    """
    if path is None or not path.exists():
        return {}
    versions = [
        {scheme: {n: Counts(**c) for n, c in tiles.items()} for scheme, tiles in found.items()}
        for name, targets in json.loads(path.read_text()).items()
        if version in (None, name) and (found := targets.get(f"sm_{target}"))
    ]
    return functools.reduce(_worse, versions) if versions else {}


def _worse(one: Found, other: Found) -> Found:
    """The larger of each figure, of what is in both."""

    def larger(a: Counts, b: Counts) -> Counts:
        figures: dict[str, Any] = {}
        for name, value in asdict(a).items():
            other = getattr(b, name)
            figures[name] = min(value, other) if isinstance(value, str) else max(value, other)
        return Counts(**figures)

    return {
        scheme: {n: larger(c, other[scheme][n]) for n, c in tiles.items() if n in other[scheme]}
        for scheme, tiles in one.items()
    }


def write_counts(path: Path, target: int, found: Found) -> None:
    """Into a --counts file, beside other architectures' and Triton versions'."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data.setdefault(triton.__version__, {})[f"sm_{target}"] = {
        scheme: {name: asdict(counts) for name, counts in sorted(tiles.items())}
        for scheme, tiles in sorted(found.items())
    }
    path.write_text(json.dumps(data) + "\n")


def write_tiles(architecture: str, entry: dict[str, Any]) -> None:
    """Replace an architecture's part of tiles.json; schemes that the entry lacks stay."""
    data = json.loads(TILES_FILE.read_text())
    data[architecture] = data.get(architecture, {}) | entry
    TILES_FILE.write_text(json.dumps(data, indent=1) + "\n")
    tile_table.cache_clear()
    select.cache_clear()


def _predict(
    targets: Iterable[int], counts: Path | None, processes: int, schemes: list[str]
) -> int:
    for target in targets:
        compiled = ALIKE.get(target, target)
        known = read_counts(counts, compiled, triton.__version__)
        found = count_candidates(compiled, processes, known, schemes)
        if counts is not None:
            write_counts(counts, compiled, found)
            found = read_counts(counts, compiled)
        gpu = time_model.GPUS[target].name
        entry: dict[str, Any] = {name: choose(SCHEMES[name], found, target) for name in schemes}
        if set(TUNED) <= set(schemes):
            entry["source"] = f"chosen by time_model.py for {gpu}, not measured"
        write_tiles(f"sm_{target}", entry)
        print(f"sm_{target}: {sum(map(len, found.values()))} candidates", flush=True)
    return 0


def _measure(counts: Path | None, most: int, quick: bool) -> int:
    if not torch.cuda.is_available():
        print("tuning measures kernels on a GPU, and no CUDA device was found", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    target = major * 10 + minor
    known = read_counts(counts, target)
    found = known or count_candidates(target, 8, {})
    shapes = shapes_of(TUNED[0])
    buckets = (16, 2048) if quick else BUCKETS
    entry: dict[str, Any] = {
        "source": f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    }
    for name in TUNED:
        scheme, by_shape = SCHEMES[name], {}
        for n, k in shapes[: 1 if quick else None]:
            offered = {m: shortlist(scheme, found, target, m, n, k, most) for m in buckets}
            by_shape[f"{n}x{k}"] = merged_rows(measure(scheme, n, k, offered, device))
        # Other shapes take the tiles of the largest one measured.
        by_shape["default"] = max(by_shape.items(), key=lambda item: _weights(item[0]))[1]
        entry[name] = by_shape
    write_tiles(f"sm_{target}", entry)
    return 0


def _weights(shape: str) -> int:
    """Weights of a shape written "NxK"."""
    n, k = shape.split("x")
    return int(n) * int(k)


def main(arguments: list[str] | None = None) -> int:
    """Regenerate tiles.json, of the GPU at hand or of architectures by prediction."""
    parser = argparse.ArgumentParser(description=__doc__, prog="qig_serve.kernels.tuning")
    parser.add_argument("--predict", action="store_true", help="choose by the model of time")
    parser.add_argument("--arch", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument(
        "--schemes", nargs="+", choices=list(KERNELS), default=TUNED, help="those of --predict"
    )
    parser.add_argument("--counts", type=Path, help="file of the compiler's figures")
    parser.add_argument("--processes", type=int, default=2, help="that compile (--predict)")
    parser.add_argument("--shortlist", type=int, default=4, help="tiles measured per bucket")
    parser.add_argument("--quick", action="store_true", help="one shape and two M: a trial")
    options = parser.parse_args(arguments)
    if options.predict:
        return _predict(options.arch, options.counts, options.processes, options.schemes)
    return _measure(options.counts, options.shortlist, options.quick)


if __name__ == "__main__":
    sys.exit(main())
