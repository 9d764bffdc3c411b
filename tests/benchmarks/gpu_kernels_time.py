"""Stage time: the headline. Sums of a layer's four linears beside cuBLAS, quantizers, the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_kernels_figures as figures
from gpu_kernels_plan import Context, Failed
from gpu_kernels_warm import HEAD

from qig_serve.kernels import tiles, w8a16
from qig_serve.kernels.tuning import compiled_as

RESERVE = 3.0
ERRORS_AT = (1, 16, 128, 2048)
HEAD_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def linear_row(bench: Any, layer: str, n: int, k: int, m: int) -> dict[str, Any]:
    """Times of one linear at M tokens: cuBLAS, and both schemes whole and as GEMMs alone."""
    row: dict[str, Any] = {"layer": layer, "n": n, "k": k, "m": m, "cublas": bench.cublas(m)}
    for scheme in figures.SCHEMES:
        tile = bench.tile(scheme, m)
        alone, whole = bench.gemm(scheme, m, tile), bench.linear(scheme, m)
        row[scheme] = {
            "us": whole, "gemm_us": whole if alone is None else alone,
            "regime": tile.regime, "tile": compiled_as(tile),
        }  # fmt: skip
        if m in ERRORS_AT:
            row[scheme]["relative_error"] = bench.error(scheme, m)
    return row


def measure_model(
    bench: Any, layers: dict[str, tuple[int, int]], limits: dict[str, float], context: Context,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Rows of a layer's linears, of its quantizers, and their sums; kept after each linear.

    A row that fails is named, and has no sum.
    """
    hidden, intermediate = layers["o"][1], layers["down"][1]
    activations: dict[int, dict[str, dict[str, float]]] = {}
    for m in figures.TOKENS:
        if context.left() < RESERVE:
            break
        activations[m] = {
            "hidden": bench.quantizers(m, hidden),
            "intermediate": bench.quantizers(m, intermediate),
        }
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "rows": rows,
        "quantizers": {str(m): parts for m, parts in activations.items()},
        "sums": [],
        "failed": {},
    }
    for layer, (n, k) in layers.items():
        bench.load(n, k)
        for m in figures.TOKENS:
            if context.left() < RESERVE:
                break
            try:
                rows.append(linear_row(bench, layer, n, k, m))
            except Exception as error:  # of whatever kind: the other rows count
                found["failed"][f"{layer} M={m}"] = f"{type(error).__name__}: {error}"[:200]
        keep(found)
    found["sums"] = figures.sums(rows, activations, limits, len(layers))
    return found


def measure_head(bench: Any, context: Context) -> list[dict[str, Any]]:
    """The output head in 8 bits with every tile tried, beside cuBLAS in 16."""
    n, k = HEAD
    rows: list[dict[str, Any]] = []
    bench.load_head(n, k)
    for m in HEAD_TOKENS:
        if context.left() < RESERVE:
            break
        fit = [tile for tile in w8a16.candidates(m) if tile.regime == "halves"]
        by_tile = {compiled_as(tile): bench.head(m, tile) for tile in fit}
        best = min(by_tile, key=lambda name: by_tile[name])
        cublas = bench.cublas(m)
        rows.append(
            {"n": n, "k": k, "m": m, "us": by_tile[best], "tile": best, "cublas": cublas,
             "ratio": cublas / by_tile[best], "tiles": by_tile}
        )  # fmt: skip
    return rows


def measure(bench: Any, context: Context) -> dict[str, Any]:
    """Everything, written as it comes."""
    found: dict[str, Any] = {"limits": bench.limits(), "goals": figures.GOALS, "models": {}}
    for model, layers in tiles.LAYER_SHAPES.items():

        def keep(part: dict[str, Any], model: str = model) -> None:
            found["models"][model] = part
            context.results.write("time", found)

        keep(measure_model(bench, layers, found["limits"], context, keep))
        sums = found["models"][model]["sums"]
        if sums:
            print(figures.table(model, sums), flush=True)
        if len(found["models"]) == 1:  # before another model: no other part has the head
            found["head"] = measure_head(bench, context)
            context.results.write("time", found)
    return found


def run(context: Context) -> None:
    """On the GPU at hand."""
    from gpu_kernels_bench import Bench

    found = measure(Bench(), context)
    missing = [model for model, entry in found["models"].items() if not entry["sums"]]
    failed = [f"{m} {row}" for m, e in found["models"].items() for row in e["failed"]]
    if failed:
        raise Failed(f"{len(failed)} rows failed: {', '.join(failed)}"[:300])
    if missing:
        raise Failed(f"there was no time for all linears of {', '.join(missing)}")
