"""From gpu_vllm.json: a Markdown table with ratios, the goals met or not, and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_vllm_run import TINY

from qig_serve.errors import UserError

OURS = ("w3a16", "w4a8", "w3a16-head16", "w4a8-unfused")
GIB = 1 << 30
DECODE_GOALS = (
    ("w3a16", 1, 2.2), ("w4a8", 1, 2.1), ("w3a16", 32, 1.8), ("w4a8", 32, 1.8),
    ("w3a16", 128, 1.2), ("w4a8", 128, 1.5), ("w3a16", 256, 1.2), ("w4a8", 256, 1.5),
)  # fmt: skip
"""(variant, batch, times bf16)"""
FIRST_TOKEN_GOALS = (("w4a8", 4096, 1.35), ("w3a16", 4096, 0.97))
"""(variant, tokens of the prompt, times bf16)"""
THROUGHPUT_GOAL = ("w4a8", 1.4)

Results = dict[str, Any]


def in_short(entry: dict[str, Any]) -> str:
    """An entry in a line, as it is measured."""
    if "unavailable" in entry:
        return f"could not run: {entry['unavailable']}"
    parts = []
    if "decode" in entry:
        rates = [f"{b}: {row['tokens_per_second']:.0f}" for b, row in entry["decode"].items()]
        parts.append("tokens per second " + ", ".join(rates))
        firsts = [f"{n}: {row['ms']:.0f}" for n, row in entry["first_token"].items()]
        parts += ["first token, ms " + ", ".join(firsts)] if firsts else []
        parts.append("ran " + ", ".join(entry["layers"]["decoder"]))
    if entry.get("not_as_named"):
        parts.append(f"NOT AS NAMED: {entry['not_as_named']}")
    if "requests_per_second" in entry:
        parts.append(f"{entry['requests_per_second']:.2f} requests per second")
    if entry.get("not_measured"):
        parts.append(f"not measured: {entry['not_measured']}")
    if "equal" in entry:
        parts.append(
            f"{entry['equal']} of {entry['questions']} answers equal the CPU's "
            f"({entry['equal_expected']:.1%} expected), exact match {entry['exact']:.1%}, "
            f"on the CPU {entry['exact_cpu']:.1%}"
        )
    if "goal_seconds" in entry:
        parts.append(f"{entry['seconds']:.0f} s (goal {entry['goal_seconds']:.0f})")
    return "; ".join(parts)


def measured(results: Results, stage: str, model: str, variant: str) -> dict[str, Any] | None:
    """An entry with figures that may be compared with others; None where there is none."""
    entry = results.get(stage, {}).get(model, {}).get(variant)
    return None if entry is None or "unavailable" in entry else entry


def value(results: Results, model: str, variant: str, what: str, size: Any = None) -> float | None:
    """Higher is better: tokens per second, first tokens per second, or requests per second."""
    stage = "throughput" if what == "throughput" else "bench"
    entry = measured(results, stage, model, variant)
    if entry is None or entry.get("not_as_named"):
        return None
    if what == "throughput":
        return float(entry["requests_per_second"])
    row = entry[what].get(str(size))
    if row is None:
        return None
    return float(row["tokens_per_second"] if what == "decode" else 1e3 / row["ms"])


def ratio(
    results: Results, model: str, variant: str, over: str, what: str, size: Any = None
) -> float | None:
    """How many times as fast; None where one is missing or another card's."""
    ours, theirs = (value(results, model, v, what, size) for v in (variant, over))
    if ours is None or theirs is None:
        return None
    stage = "throughput" if what == "throughput" else "bench"
    cards = {results[stage][model][v]["machine"]["card"] for v in (variant, over)}
    return ours / theirs if len(cards) == 1 else None


def rivals(results: Results, model: str) -> list[str]:
    """Quantized variants that are not ours and ran."""
    found = results.get("bench", {}).get(model, {})
    return [v for v in found if v not in ("bf16", *OURS) and measured(results, "bench", model, v)]


def goals(results: Results) -> Iterator[tuple[str, str, bool]]:
    """(goal, what was measured, met) for all that was measured; nothing of tiny models."""
    if TINY in str(results):
        return
    for model in results.get("bench", {}):
        for variant, batch, goal in DECODE_GOALS:
            found = ratio(results, model, variant, "bf16", "decode", batch)
            if found is not None:
                text = f"{model}: {variant} decodes {goal:g}x bf16 at batch {batch}"
                yield text, f"{found:.2f}x", found >= goal
        for variant, size, goal in FIRST_TOKEN_GOALS:
            found = ratio(results, model, variant, "bf16", "first_token", size)
            if found is not None:
                text = f"{model}: {variant} has the first of {size} tokens {goal:g}x as soon"
                yield text, f"{found:.2f}x", found >= goal
        for rival in rivals(results, model):
            yield from _ahead(results, model, "w3a16", rival, "decode", 1)
            yield from _ahead(results, model, "w3a16", rival, "decode", 32)
            for size in _sizes(results, model, "first_token"):
                yield from _ahead(results, model, "w4a8", rival, "first_token", size)
            yield from _ahead(results, model, "w4a8", rival, "throughput", None)
    for model in results.get("throughput", {}):
        variant, goal = THROUGHPUT_GOAL
        found = ratio(results, model, variant, "bf16", "throughput")
        if found is not None:
            text = f"{model}: {variant} answers {goal:g}x as many requests as bf16"
            yield text, f"{found:.2f}x", found >= goal
    for model, schemes in results.get("quantize8b", {}).items():
        for scheme, entry in schemes.items():
            text = f"{model}: quantized to {scheme} within {entry['goal_seconds']:.0f} s"
            yield text, f"{entry['seconds']:.0f} s", entry["seconds"] <= entry["goal_seconds"]
    for name, entry in results.get("demo", {}).items():
        if "unavailable" not in entry:
            fine = entry["exact_equal_within_interval"]
            if entry["same_checkpoint"]:
                fine = fine and entry["tokens_within_noise"]
            yield f"demo {name}: the CPU's answers", in_short(entry), fine


def _ahead(
    results: Results, model: str, variant: str, rival: str, what: str, size: Any
) -> Iterator[tuple[str, str, bool]]:
    found = ratio(results, model, variant, rival, what, size)
    if found is not None:
        where = {"decode": f"decode at batch {size}", "first_token": f"first of {size} tokens",
                 "throughput": "throughput"}[what]  # fmt: skip
        yield f"{model}: {variant} ahead of {rival}, {where}", f"{found:.2f}x", found > 1


def _sizes(results: Results, model: str, what: str) -> list[str]:
    entries = results.get("bench", {}).get(model, {}).values()
    found = {size for e in entries if "unavailable" not in e for size in e[what]}
    return sorted(found, key=int)


def _cell(absolute: str, times: float | None) -> str:
    return absolute if times is None else f"{absolute} ({times:.2f}x)"


def markdown(results: Results) -> str:
    """All tables; empty sections are left out."""
    lines: list[str] = []
    for model, variants in results.get("bench", {}).items():
        lines += [*_bench_table(results, model, variants), ""]
    for model, variants in results.get("bench", {}).items():
        lines += [*_profile_table(model, variants), ""]
    reached = list(goals(results))
    if reached:
        lines += ["| goal | measured | met |", "|---|---|---|"]
        lines += [f"| {goal} | {seen} | {'yes' if met else 'no'} |" for goal, seen, met in reached]
    quantized = results.get("quantize8b", {})
    for model, schemes in quantized.items():
        for scheme, entry in schemes.items():
            peak = entry["peak_device_bytes"] or entry["peak_process_bytes"]
            lines += ["", f"Quantizing {model} to {scheme} with {entry['samples']} samples took "
                      f"{entry['seconds']:.0f} s and {peak / GIB:.1f} GiB at most."]  # fmt: skip
    return "\n".join(lines).strip() or "nothing was measured yet"


def _bench_table(results: Results, model: str, variants: dict[str, Any]) -> list[str]:
    batches = [str(b) for b in _sizes(results, model, "decode")]
    prompts = _sizes(results, model, "first_token")
    about = next(iter(variants.values()))["machine"]
    head = [
        f"{model} on {about['card']}",
        *(f"tokens/s, batch {b}" for b in batches),
        *(f"first token of {n}, ms" for n in prompts),
        "requests/s", "weights, peak without KV cache, GiB", "start-up, s", "what ran",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    notes = []
    for name, entry in variants.items():
        if "unavailable" in entry:
            notes.append(f"{name} could not run: {entry['unavailable']}")
            continue
        row = [name]
        for batch in batches:
            times = ratio(results, model, name, "bf16", "decode", batch)
            found = entry["decode"].get(batch)
            row.append(_cell(f"{found['tokens_per_second']:.0f}", times) if found else "")
        for size in prompts:
            times = ratio(results, model, name, "bf16", "first_token", size)
            found = entry["first_token"].get(size)
            row.append(_cell(f"{found['ms']:.0f}", times) if found else "")
        rate = value(results, model, name, "throughput")
        times = ratio(results, model, name, "bf16", "throughput")
        row.append("" if rate is None else _cell(f"{rate:.1f}", times))
        memory = entry["memory"]
        peak = memory.get("peak_without_kv_cache", memory["peak"])
        row.append(f"{memory['weights'] / GIB:.1f}, {peak / GIB:.1f}")
        row.append(f"{sum(entry['start_up'].values()):.0f}")
        row.append(", ".join(entry["layers"]["decoder"]))
        if entry["not_as_named"]:
            row[-1] += " (**not as named**)"
        if entry.get("not_measured"):
            reported = (f"{piece} ({reason})" for piece, reason in entry["not_measured"].items())
            notes.append(f"{name}: not measured: {', '.join(reported)}")
        lines.append(f"| {' | '.join(row)} |")
    beside = {e["started_beside"] for e in variants.values() if e.get("started_beside")}
    if beside:
        notes.append(f"Start-up is of engines that started beside {max(beside)} others.")
    return [*lines, *(f"\n{note}" for note in notes)]


def _idle(row: dict[str, Any]) -> dict[str, float]:
    """Time in which no kernel ran, where the profile has it."""
    return {"(no kernel)": row["idle_us"]} if "idle_us" in row else {}


def _profile_table(model: str, variants: dict[str, Any]) -> list[str]:
    columns = []
    for name, entry in variants.items():
        if "unavailable" in entry:
            continue
        for size, row in entry["profile"].items():
            if "decode_us" in row:
                times = row["decode_us"] | {"(of it lm_head)": row["lm_head_us"]} | _idle(row)
                columns.append((f"{name}, decode at batch {size}", times))
            else:
                columns.append(
                    (f"{name}, prefill of {row['tokens']}", row["prefill_us"] | _idle(row))
                )
    if not columns:
        return []
    lines = [f"| {model}, us | {' | '.join(c for c, _ in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for group in dict.fromkeys(g for _, times in columns for g in times):
        cells = []
        for _, times in columns:
            total = sum(t for g, t in times.items() if not g.startswith("(")) or 1.0
            share = times.get(group)
            cells.append("" if share is None else f"{share:.0f} ({share / total:.0%})")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


def plot(results: Results, path: Path) -> Path:
    """Decode and first token, times bf16, against batch and prompt; a column per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(results.get("bench", {}))
    if not models:
        raise UserError("nothing was measured yet: run together first")
    figure, axes = pyplot.subplots(2, len(models), figsize=(5.5 * len(models), 8), squeeze=False)
    for column, model in enumerate(models):
        for line, (what, label) in enumerate(
            (("decode", "batch"), ("first_token", "prompt tokens, half of them pictures"))
        ):
            axis = axes[line][column]
            sizes = [int(size) for size in _sizes(results, model, what)]
            for name in results["bench"][model]:
                points = [
                    (size, found)
                    for size in sizes
                    if (found := ratio(results, model, name, "bf16", what, size)) is not None
                ]
                if points and name != "bf16":
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        label=name,
                        linewidth=2 if name in OURS else 1,
                        linestyle="-" if name in OURS else "--",
                    )
                    axis.legend(fontsize=7)
            title = "decode" if what == "decode" else "first token"
            axis.set(title=f"{model}: {title}, times as fast as bf16", xlabel=label, xscale="log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set_ylim(bottom=0)
    about = next(iter(results["bench"][models[0]].values()))["machine"]
    figure.suptitle(f"{about['card']}, vLLM {about['versions'].get('vllm', '?')}, {about['date']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
