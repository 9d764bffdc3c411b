"""Stage time: the headline. Sums of a layer's four linears beside cuBLAS, quantizers, the head."""

from __future__ import annotations

from typing import Any

import gpu_kernels_figures as figures
from gpu_kernels_plan import Context, Failed
from gpu_kernels_warm import HEAD, HEAD_TILES

from qig_serve.kernels import tiles
from qig_serve.kernels.tuning import compiled_as

RESERVE = 3.0
ERRORS_AT = (1, 16, 128, 2048)
HEAD_TOKENS = (1, 2, 4, 8, 16, 32)


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
    bench: Any, layers: dict[str, tuple[int, int]], limits: dict[str, float], context: Context
) -> dict[str, Any]:
    """Rows of a layer's linears, of its quantizers, and their sums."""
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
    for layer, (n, k) in layers.items():
        bench.load(n, k)
        for m in figures.TOKENS:
            if context.left() < RESERVE:
                break
            rows.append(linear_row(bench, layer, n, k, m))
    whole = {layer for layer in layers if any(r["layer"] == layer for r in rows)} == set(layers)
    return {
        "rows": rows,
        "quantizers": {str(m): parts for m, parts in activations.items()},
        "sums": figures.sums(rows, activations, limits) if whole else [],
    }


def measure_head(bench: Any, context: Context) -> list[dict[str, Any]]:
    """The output head in 8 bits with every tile tried, beside cuBLAS in 16."""
    n, k = HEAD
    rows: list[dict[str, Any]] = []
    bench.load_head(n, k)
    for m in HEAD_TOKENS:
        if context.left() < RESERVE:
            break
        by_tile = {compiled_as(t): bench.head(m, t) for t in HEAD_TILES if m > 8 or t.block_m <= 8}
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
        found["models"][model] = measure_model(bench, layers, found["limits"], context)
        context.results.write("time", found)
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
    if missing:
        raise Failed(f"there was no time for all linears of {', '.join(missing)}")
