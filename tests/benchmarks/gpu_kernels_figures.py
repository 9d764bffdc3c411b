"""From times to figures: limits, sums of a layer, ratios, goals, and the plot. No GPU, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMES = ("w3a16", "w4a8")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
GOALS: dict[str, tuple[tuple[int, float], ...]] = {
    "w3a16": ((8, 3.6), (16, 3.2), (32, 2.4), (64, 1.9), (128, 1.3), (512, 0.97), (8192, 0.97)),
    "w4a8": ((8, 3.4), (16, 3.2), (32, 2.8), (64, 2.4), (128, 1.9), (512, 1.5), (8192, 1.55)),
}
"""(largest M, times as fast as cuBLAS in bf16): a layer's linears, activations quantized."""
BITS = {"w3a16": 3 + 32 / 128, "w4a8": 4.0}
"""Of a weight as stored, scales and zero points included (w4a8's are a channel's)."""

Times = dict[str, Any]
"""Of a linear at M tokens: "m", "n", "k", "layer", "cublas", scheme -> {"us", "gemm_us", ...}."""


def goal(scheme: str, m: int) -> float:
    """What is to be reached at M tokens."""
    return next(times for most, times in GOALS[scheme] if m <= most)


def floor(scheme: str, m: int, n: int, k: int, limits: dict[str, float]) -> float:
    """Microseconds below which no kernel is, by the limits measured in the same run.

    The larger of reading every byte once (the output is written) and of every operation; int8
    tensor cores do twice the operations of bf16.
    """
    moved = n * k * BITS[scheme] / 8 + 2 * m * (k + n)
    rate = limits["bf16"] * (2 if scheme == "w4a8" else 1)
    return max(moved / limits["read"], 2 * m * n * k / rate) * 1e6


def fused_cost(scheme: str, layer: str, regime: str, parts: dict[str, dict[str, float]]) -> float:
    """Microseconds by which quantizing lengthens what is before a linear, where vLLM compiles.

    qkv and gate_up follow an RMSNorm, down a SiLU * up: what counts is the fused kernel less its
    16-bit twin. o follows attention, and is quantized alone. parts: "hidden" and "intermediate" ->
    times of the quantizers of rows of that size. A GEMM that takes 16 bits costs nothing.
    """
    if scheme == "w3a16" and regime != "halves":
        return 0.0
    alone = "quantize" if scheme == "w4a8" else "split_halves"
    kind = alone.split("_")[-1]
    hidden = parts["hidden"]
    if layer == "o":
        return hidden[alone]
    if layer == "down":
        inter = parts["intermediate"]
        return max(0.0, inter[f"silu_mul_{kind}"] - inter["silu_mul"])
    return max(0.0, hidden[f"rms_norm_{kind}"] - hidden["rms_norm"])


def sums(
    rows: Iterable[Times],
    activations: dict[int, dict[str, dict[str, float]]],
    limits: dict[str, float],
    layers: int = 4,
) -> list[dict[str, Any]]:
    """A layer's linears added up, one entry per number of tokens that all of them have."""
    by_m: dict[int, list[Times]] = {}
    for row in rows:
        by_m.setdefault(row["m"], []).append(row)
    entries = []
    for m, found in sorted(by_m.items()):
        if len(found) < layers:
            continue  # the time was up, or one failed
        entry: dict[str, Any] = {"m": m, "cublas": sum(row["cublas"] for row in found)}
        for scheme in SCHEMES:
            us = sum(row[scheme]["us"] for row in found)
            alone = sum(row[scheme]["gemm_us"] for row in found)
            low = sum(floor(scheme, m, row["n"], row["k"], limits) for row in found)
            one = {
                "us": us, "gemm_us": alone, "ratio": entry["cublas"] / us,
                "gemm_ratio": entry["cublas"] / alone, "goal": goal(scheme, m),
                "met": entry["cublas"] / us >= goal(scheme, m),
                "limit_us": low, "fraction_of_limit": low / us,
            }  # fmt: skip
            if m in activations:
                extra = sum(
                    fused_cost(scheme, row["layer"], row[scheme]["regime"], activations[m])
                    for row in found
                )
                one["fused_us"] = alone + extra
                one["fused_ratio"] = entry["cublas"] / one["fused_us"]
            entry[scheme] = one
        entries.append(entry)
    return entries


def table(model: str, entries: list[dict[str, Any]]) -> str:
    """The headline as Markdown."""
    lines = [
        f"{model}, sum of a layer's four linears in us (of cuBLAS bf16; goal; of the limit)",
        "",
        "| M | cuBLAS bf16 | w3a16 | fused | w4a8 | fused |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [str(entry["m"]), f"{entry['cublas']:.0f}"]
        for scheme in SCHEMES:
            one = entry[scheme]
            mark = "" if one["met"] else " **below**"
            cells.append(
                f"{one['us']:.1f} ({one['ratio']:.2f}x; {one['goal']:g}x{mark}; "
                f"{one['fraction_of_limit']:.0%})"
            )
            cells.append(
                f"{one['fused_us']:.1f} ({one['fused_ratio']:.2f}x)" if "fused_us" in one else ""
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> bool:
    """Times as fast as cuBLAS with the goals, and fraction of the limit; False without figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = {
        n: e["sums"] for n, e in result.get("time", {}).get("models", {}).items() if e["sums"]
    }
    if not models:
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for column, scheme in enumerate(SCHEMES):
        upper, lower = axes[0][column], axes[1][column]
        for model, entries in models.items():
            tokens = [entry["m"] for entry in entries]
            ratios = [entry[scheme]["ratio"] for entry in entries]
            upper.plot(tokens, ratios, marker="o", label=model)
            part = [entry[scheme]["fraction_of_limit"] for entry in entries]
            lower.plot(tokens, part, marker="o", label=model)
        goals = [goal(scheme, m) for m in TOKENS]
        upper.plot(TOKENS, goals, color="grey", linestyle="--", label="goal")
        upper.axhline(1, color="grey", linewidth=0.8)
        upper.set(title=f"{scheme}: times as fast as cuBLAS bf16", xscale="log")
        upper.set_ylim(bottom=0)
        upper.legend(fontsize=7)
        lower.set(title="fraction of the measured limit", xlabel="tokens", ylim=(0, 1.05))
    about = result.get("machine", {})
    figure.suptitle(f"sum of a layer's four linears, {about.get('card')}, {about.get('date')}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
