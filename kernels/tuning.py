"""Tile choices per architecture and number of tokens, as data (tiles.json), and what makes it.

    python -m qig_serve.kernels.tuning [--quick]

measures candidates on the GPU at hand, at the layer shapes of LAYER_SHAPES, and rewrites its
architecture's part of tiles.json. Nothing is searched at serve time: `select` looks up.

tiles.json: {"sm_90": {"source": how the figures were had, scheme: {"default" or "NxK": [tile with
"max_m", ...]}}}, tiles by ascending max_m, the last one without a bound (null).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from qig_serve.formats import SCHEMES, QuantScheme

TILES_FILE = Path(__file__).with_name("tiles.json")
DECODE_ROWS = 64
"""Most tokens that a split_k tile takes: bounds the counters a layer keeps."""

LAYER_SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "Qwen2-VL-7B": {  # and LLaVA-OneVision-7B
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
    "InternVL2-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}
"""(N, K) of a decoder layer's fused linears, without tensor parallelism."""

Regime = Literal["split_k", "prefill", "dequantize"]


@dataclass(frozen=True)
class Tile:
    """How a kernel is shaped. Regimes: see the header of w3a16.py."""

    regime: Regime
    block_m: int = 16
    """Tokens a tile."""
    block_n: int = 256
    """Outputs a tile."""
    num_warps: int = 4
    num_stages: int = 4
    """Loads in flight along K."""
    programs_per_sm: int = 4
    """split_k: programs an SM that K is split for."""
    group_m: int = 8
    """prefill: token tiles that share a column of outputs."""


Buckets = list[tuple[float, Tile]]


@functools.cache
def tile_table() -> dict[tuple[str, str, str], Buckets]:
    """(architecture, scheme, "default" or "NxK") -> [(largest M, tile), ...] of tiles.json."""
    table: dict[tuple[str, str, str], Buckets] = {}
    for architecture, schemes in json.loads(TILES_FILE.read_text()).items():
        for scheme, shapes in schemes.items():
            if scheme == "source":
                continue
            for shape, rows in shapes.items():
                table[architecture, scheme, shape] = [
                    (
                        float("inf") if row["max_m"] is None else row["max_m"],
                        Tile(**{k: v for k, v in row.items() if k != "max_m"}),
                    )
                    for row in rows
                ]
    return table


def architecture_of(capability: tuple[int, int]) -> str | None:
    """Whose tiles in tiles.json a device takes: those of its major version, and not newer."""
    major, minor = capability
    known = {int(name[3:]) for name, _, _ in tile_table()}
    fits = [number for number in known if number // 10 == major and number % 10 <= minor]
    return f"sm_{max(fits)}" if fits else None


def buckets(scheme: QuantScheme, architecture: str, n: int, k: int) -> Buckets:
    """[(largest M, tile), ...] for a linear [N, K], ascending; the last M is infinite."""
    table = tile_table()
    measured = table.get((architecture, scheme.name, f"{n}x{k}"))
    return measured or table[architecture, scheme.name, "default"]


@functools.cache
def select(scheme: QuantScheme, architecture: str, n: int, k: int, m: int) -> Tile:
    """The tile for M tokens."""
    return next(tile for most, tile in buckets(scheme, architecture, n, k) if m <= most)


# ---- measuring


def candidates(scheme: QuantScheme, m: int) -> list[Tile]:
    """What is tried at M tokens; what does not fit the device is skipped."""
    tiles: list[Tile] = []
    if m <= DECODE_ROWS:
        block_m = max(16, 1 << (m - 1).bit_length())
        for block_n, warps in ((128, 4), (256, 4), (256, 8)):
            for stages in (3, 4, 5):
                for programs in (1, 2, 3, 4, 6):
                    tiles.append(Tile("split_k", block_m, block_n, warps, stages, programs))
    if m > 32:
        for block_m, block_n, warps in (
            (64, 128, 4), (64, 256, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8),
        ):  # fmt: skip
            for stages in (2, 3, 4):
                tiles.append(Tile("prefill", block_m, block_n, warps, stages))
        if scheme.name == "w3a16":
            tiles.append(Tile("dequantize"))
    return tiles


def random_linear(
    scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Kernel tensors of a linear with random codes and scales."""
    from qig_serve.kernels import ops
    from qig_serve.packing import pack_linear, scale_dtype

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


def time_microseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a CUDA-graphed call with a cold L2, microseconds."""
    device = torch.cuda.current_device()
    flush = torch.empty(
        4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device="cuda"
    )
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        flush.random_(0, 127)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(
    scheme: QuantScheme, n: int, k: int, ms: tuple[int, ...], device: torch.device
) -> list[dict[str, object]]:
    """The fastest tile a bucket (max_m of each but the last, which is unbounded)."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from qig_serve.kernels import ops

    prepared = random_linear(scheme, n, k, torch.bfloat16, device)
    rows: list[dict[str, object]] = []
    for m in ms:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        timed: list[tuple[float, Tile]] = []
        for tile in candidates(scheme, m):
            call = functools.partial(ops.run, scheme, x, prepared, n, None, tile)
            try:
                timed.append((time_microseconds(call), tile))
            except (OutOfResources, CompilationError, PTXASError):
                continue
        microseconds, best = min(timed, key=lambda pair: pair[0])
        print(f"{scheme.name} {n}x{k} M={m}: {microseconds:.1f} us {best}", flush=True)
        rows.append({"max_m": None if m == ms[-1] else m, **asdict(best)})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Regenerate the tiles of the GPU at hand."""
    parser = argparse.ArgumentParser(description=__doc__, prog="qig_serve.kernels.tuning")
    parser.add_argument("--quick", action="store_true", help="one shape and two M: a trial")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning measures kernels on a GPU, and no CUDA device was found", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    architecture = f"sm_{capability[0]}{capability[1]}"
    ms = (16, 2048) if options.quick else (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
    shapes = {shape for layer in LAYER_SHAPES.values() for shape in layer.values()}
    data = json.loads(TILES_FILE.read_text())
    entry: dict[str, object] = {
        "source": f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    }
    for name in ("w3a16", "w4a8"):
        by_shape = {}
        for n, k in sorted(shapes)[: 1 if options.quick else None]:
            by_shape[f"{n}x{k}"] = measure(SCHEMES[name], n, k, ms, device)
        # Other shapes take the tiles of the largest one measured.
        by_shape["default"] = max(by_shape.items(), key=lambda item: _weights(item[0]))[1]
        entry[name] = by_shape
    data[architecture] = entry
    TILES_FILE.write_text(json.dumps(data, indent=1) + "\n")
    tile_table.cache_clear()
    select.cache_clear()
    return 0


def _weights(shape: str) -> int:
    """Weights of a shape written "NxK"."""
    n, k = shape.split("x")
    return int(n) * int(k)


if __name__ == "__main__":
    sys.exit(main())
