"""Stage tune: the tiles that the model of time puts first are timed, and tiles.json is written.

Every time is kept as a row that fit_time_model.py reads, beside the compiler's figures, so that
the model can be fitted anew from any run: kernel-times-<card>-<commit>.json. Of w4a8 and of w3a16's
halves the GEMM alone is timed: what makes integers of activations is the same for every tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_kernels_warm as warm
from gpu_kernels_plan import Context, Failed, slug, write_json

from qig_serve.formats import SCHEMES
from qig_serve.kernels import launch, ops, tiles, time_model, tuning
from qig_serve.kernels.tiles import Tile

WRONG = 0.02
"""Relative error of a product from which a tile is no candidate (w4a8's activations: 0.01)."""
ELSEWHERE = 3
"""Tiles of another shape that are tried."""
RESERVE = 4.0
"""Seconds kept for writing."""
HOW = (
    "us: mean of a call in a CUDA graph through copies of the weights (400 MB, L2 is cold), "
    "median of 5; GEMMs alone, without what makes integers of activations. counts: what Triton "
    "makes of the kernels (kernels/sass.py). early: programmatic dependent launch. work: "
    "time_model.Work. gpu: what replaces time_model.GPUS's numbers for this card."
)
Row = dict[str, Any]


def layer_of(n: int, k: int) -> str:
    """The first layer of tiles.LAYER_SHAPES with these sizes."""
    for layers in tiles.LAYER_SHAPES.values():
        for layer, shape in layers.items():
            if shape == (n, k):
                return layer
    return f"{n}x{k}"


def row(
    scheme: str, tile: Tile, target: int, m: int, n: int, k: int, us: float,
    predicted: float | None, sms: int, early: bool,
) -> Row:  # fmt: skip
    """A time, with all that the model of time knows of the launch."""
    found: Row = {
        "kernel": f"{scheme} {tuning.compiled_as(tile)}", "scheme": scheme, "layer": layer_of(n, k),
        "n": n, "k": k, "m": m, "us": us, "predicted": predicted, "early": early, "wide": False,
        "tile": dataclasses.asdict(tile),
    }  # fmt: skip
    if tile.regime != "dequantize":
        orders = launch.orders_for(target)
        kernel = ops.KERNELS[scheme].kernel(tile, "bf16", orders)
        bits = tuning.stored_bits(SCHEMES[scheme])
        found["work"] = dataclasses.asdict(time_model.work(kernel, bits, m, n, k, sms))
    return found


def _predicted(
    scheme: str, tile: Tile, found: tuning.Found, target: int, m: int, n: int, k: int
) -> float | None:
    """By the model; None for what it knows no figures of (JSON has no infinity)."""
    if not found:
        return None
    guess = tuning.predicted(SCHEMES[scheme], tile, found, target, m, n, k)
    return guess if guess < float("inf") else None


def measure(
    bench: Any, target: int, sms: int, found: tuning.Found, left: Callable[[], float],
    keep: Callable[[list[Row]], None], failed: dict[str, str],
) -> list[Row]:  # fmt: skip
    """Rows of every shape, scheme and bucket, until no time is left; kept after each shape.

    failed: takes the reasons of tiles that have no time.
    """
    rows: list[Row] = []
    for n, k in warm.shapes():
        bench.load(n, k)
        for scheme, m, tile in _offered(found, target, n, k, rows):
            if left() < RESERVE:
                keep(rows)
                return rows
            try:
                us = bench.gemm(scheme, m, tile)
                reason = "the device cannot run it"
                if us is not None and (error := bench.tile_error(scheme, m, tile)) > WRONG:
                    us, reason = None, f"its answers are wrong: relative error {error:.2g}"
            except Exception as error:  # of whatever kind: the other tiles count
                us, reason = None, f"{type(error).__name__}: {error}"[:200]
            if us is None:
                failed[f"{scheme} {n}x{k} M={m} {tuning.compiled_as(tile)}"] = reason
                continue
            guess = _predicted(scheme, tile, found, target, m, n, k)
            rows.append(row(scheme, tile, target, m, n, k, us, guess, sms, target >= 90))
        keep(rows)
    return rows


def _offered(
    found: tuning.Found, target: int, n: int, k: int, rows: list[Row]
) -> Iterator[tuple[str, int, Tile]]:
    """Scheme, M and tile; beside the model of time's those that `rows` have as fastest at M."""
    for scheme in ("w3a16", "w4a8"):
        for m in tuning.BUCKETS:
            first = warm.offered(scheme, found, target, m, n, k)
            for tile in dict.fromkeys([*first, *_fastest_elsewhere(rows, scheme, m)]):
                yield scheme, m, tile


def _fastest_elsewhere(rows: list[Row], scheme: str, m: int) -> list[Tile]:
    """The few fastest tiles of every shape that is timed already."""
    by_shape: dict[tuple[int, int], list[Row]] = {}
    for r in rows:
        if (r["scheme"], r["m"]) == (scheme, m):
            by_shape.setdefault((r["n"], r["k"]), []).append(r)
    return [
        Tile(**r["tile"])
        for timed in by_shape.values()
        for r in sorted(timed, key=lambda r: r["us"])[:ELSEWHERE]
    ]


def entry(rows: list[Row], architecture: str, source: str) -> dict[str, Any]:
    """tiles.json's part of an architecture: the fastest tiles; what has no time stays as it was."""
    made: dict[str, Any] = {"source": source}
    for scheme in ("w3a16", "w4a8"):
        mine = [r for r in rows if r["scheme"] == scheme]
        shapes = list(dict.fromkeys((r["n"], r["k"]) for r in mine))
        part: dict[str, list[Row]] = {"default": []}
        for m in tuning.BUCKETS:
            part["default"].append(_bucket(m, _for_all(mine, m, shapes, scheme, architecture)))
        for n, k in shapes:
            part[f"{n}x{k}"] = [
                _bucket(m, _fastest(mine, m, n, k) or tiles.select(scheme, architecture, n, k, m))
                for m in tuning.BUCKETS
            ]
        old = {
            (f"{name}", most, tile)
            for (of, by, name), buckets in tiles.tile_table().items()
            if of == architecture and by == scheme and name not in part
            for most, tile in buckets
        }
        for name, most, tile in sorted(old, key=lambda item: (item[0], item[1])):
            bound = None if most == float("inf") else int(most)
            part.setdefault(name, []).append({"max_m": bound, **dataclasses.asdict(tile)})
        made[scheme] = {name: tuning.merged_rows(buckets) for name, buckets in part.items()}
    return made


def _bucket(m: int, tile: Tile) -> Row:
    return {"max_m": None if m == tuning.BUCKETS[-1] else m, **dataclasses.asdict(tile)}


def _fastest(rows: list[Row], m: int, n: int, k: int) -> Tile | None:
    timed = [r for r in rows if (r["m"], r["n"], r["k"]) == (m, n, k)]
    return Tile(**min(timed, key=lambda r: r["us"])["tile"]) if timed else None


def _for_all(
    rows: list[Row], m: int, shapes: list[tuple[int, int]], scheme: str, architecture: str
) -> Tile:
    """Of other shapes: the tile with the smallest sum, of those timed for every shape."""
    sums: dict[Tile, list[float]] = {}
    for r in rows:
        if r["m"] == m:
            sums.setdefault(Tile(**r["tile"]), []).append(r["us"])
    common = {tile: sum(us) for tile, us in sums.items() if len(us) == len(shapes)}
    if common:
        return min(common, key=lambda tile: common[tile])
    largest = max(shapes, key=lambda s: s[0] * s[1], default=(0, 0))
    return _fastest(rows, m, *largest) or tiles.select(scheme, architecture, 0, 0, m)


def times_file(
    rows: list[Row], about: dict[str, Any], found: tuning.Found, gpu: dict[str, Any]
) -> dict[str, Any]:
    """What fit_time_model.py reads: rows whose kernels the compiler's figures are known of."""
    names = {
        f"{scheme} {name}": dataclasses.asdict(counts)
        for scheme, by_name in found.items()
        for name, counts in by_name.items()
    }
    kept = [r for r in rows if "work" in r and r["kernel"] in names]
    used = {r["kernel"]: names[r["kernel"]] for r in kept}
    versions = about.get("versions", {})
    return {
        "card": about.get("card"), "torch": versions.get("torch"),
        "triton": versions.get("triton"), "commit": about.get("commit"), "how": HOW,
        "target": about.get("capability"), "gpu": gpu,
        "counts": used, "rows": kept,
    }  # fmt: skip


def summary(rows: list[Row]) -> dict[str, Any]:
    """How near the model's times were, and what its first choice would have cost."""
    known = [r for r in rows if r["predicted"] is not None]
    errors = sorted(abs(r["predicted"] / r["us"] - 1) for r in known)
    lost = []
    for key in dict.fromkeys((r["scheme"], r["n"], r["k"], r["m"]) for r in known):
        same = [r for r in known if (r["scheme"], r["n"], r["k"], r["m"]) == key]
        first = min(same, key=lambda r: r["predicted"])["us"]
        lost.append(first / min(r["us"] for r in same) - 1)
    return {
        "rows": len(rows),
        "median_error_of_model": errors[len(errors) // 2] if errors else None,
        "cost_of_its_first_choice": sum(lost) / len(lost) if lost else None,
    }


def run(context: Context) -> None:
    """Measure, write tiles.json (and a copy beside the results), the rows, and a summary."""
    import torch
    from gpu_kernels_bench import Bench

    about = context.results.read()["machine"]
    target, sms = about["capability"], about["sms"]
    found, bench = warm.known_counts(target), Bench()
    commit = (about.get("commit") or "unknown")[:7]
    path = context.out / f"kernel-times-{slug(about['card'])}-{commit}.json"
    bandwidth = bench.limits()["read"]
    gpu = {"bandwidth": bandwidth, "sms": sms}

    failed: dict[str, str] = {}

    def keep(rows: list[Row]) -> None:
        write_json(path, times_file(rows, about, found, gpu))
        whole = {**summary(rows), "file": path.name, "failed": failed, "all": rows}
        context.results.write("tune", whole)

    rows = measure(bench, target, sms, found, context.left, keep, failed)
    if not rows:
        raise Failed("no tile was timed")
    architecture = bench.architecture
    wanted = len(warm.shapes()) * 2 * len(tuning.BUCKETS)
    timed = len({(r["scheme"], r["n"], r["k"], r["m"]) for r in rows})
    if failed:
        print(f"{len(failed)} tiles have no time: {next(iter(failed.items()))}", flush=True)
    source = f"measured on {about['card']}, torch {torch.__version__}, {about['date']}, {commit}"
    if timed < wanted:
        source += f" ({timed} of {wanted} buckets; the others as they were)"
    tuning.write_tiles(architecture, entry(rows, architecture, source))
    write_json(context.out / "tiles.json", _tiles_file(tiles.TILES_FILE))
    print(f"{len(rows)} times in {timed} of {wanted} buckets; {summary(rows)}", flush=True)
    if timed < wanted:
        raise Failed(f"{timed} of {wanted} buckets were timed, for the others there was no time")


def _tiles_file(path: Path) -> Any:
    import json

    return json.loads(path.read_text())
