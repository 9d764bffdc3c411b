"""Stage counters: twelve launches under Nsight Compute, reduced to what limits each.

    ncu --clock-control none --set full -k regex:... --csv --page raw python gpu_kernels_counters.py

runs the launches once each, with the tiles of tiles.json; `parse` reads what ncu prints.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_kernels_plan import Context, Failed

SHAPE = (37888, 3584)
"""gate_up of Qwen2-VL-7B."""
LAUNCHES = (
    ("w3a16", 1), ("w3a16", 8), ("w3a16", 16), ("w3a16", 64), ("w3a16", 128), ("w3a16", 512),
    ("w3a16", 2048), ("w4a8", 1), ("w4a8", 16), ("w4a8", 64), ("w4a8", 512), ("w4a8", 2048),
)  # fmt: skip
KERNELS = r"^(halves_kernel|w3a16_\w+_kernel|w4a8_\w+_kernel)$"
SCALE = {"n": 1e-3, "u": 1.0, "m": 1e3, "": 1e6, "s": 1e6}
"""Microseconds of a unit by its first letter: ns, us, ms, s; nsecond, usecond, ..."""
PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

METRICS: dict[str, tuple[str, ...]] = {
    "us": (r"gpu__time_duration\.(sum|avg|max)",),
    "dram_percent": (
        r"(gpu__)?dram__throughput\.avg\.pct_of_peak_sustained_elapsed",
        r"gpu__dram_throughput\.avg\.pct_of_peak_sustained_elapsed",
    ),
    "dram_bytes_per_second": (
        r"dram__bytes_read\.sum\.per_second",
        r"dram__bytes\.sum\.per_second",
    ),
    "issue_percent": (
        r"smsp__issue_active\.avg\.pct_of_peak_sustained_active",
        r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
        r"smsp__issue_active\.avg\.per_cycle_active",
    ),
    "alu_percent": (r"sm__inst_executed_pipe_alu\.avg\.pct_of_peak_sustained_active",
                    r"sm__pipe_alu_cycles_active\.avg\.pct_of_peak_sustained_active"),
    "tensor_percent": (
        r"sm__pipe_tensor(_op_(gmma|hmma|imma))?_cycles_active\.avg\.pct_of_peak_sustained_active",
        r"sm__inst_executed_pipe_tensor(_op_\w+)?\.avg\.pct_of_peak_sustained_active",
    ),
    "occupancy_percent": (r"sm__warps_active\.avg\.pct_of_peak_sustained_active",),
    "registers": (r"launch__registers_per_thread",),
    "programs": (r"launch__grid_size",),
    "waves": (r"launch__waves_per_multiprocessor",),
}  # fmt: skip
"""What is kept -> patterns of ncu's names for it, of which the largest match counts."""
STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.(?:ratio|pct)$"
)
REASONS = {
    "long_scoreboard": "loads from memory or L2",
    "short_scoreboard": "shared memory",
    "wait": "the latency of the instruction before",
    "barrier": "the other warps of the program",
    "math_pipe_throttle": "a busy pipe",
    "mio_throttle": "the queue of shared-memory instructions",
    "lg_throttle": "the queue of loads",
    "gmma": "the tensor cores",
    "tensor": "the tensor cores",
    "membar": "stores to be seen by others",
    "branch_resolving": "branches",
    "no_instruction": "the instruction cache",
    "dispatch_stall": "dispatch",
    "drain": "stores to leave",
    "sleeping": "sleep",
}
SHARES = ("dram", "issue", "alu", "tensor", "occupancy")
HEADER = (
    "launch", "kernel", "us", "DRAM", "issue", "ALU", "tensor", "warps", "stalls per issue",
    "what limits",
)  # fmt: skip
BUSY = 75.0
"""Percent from which a unit is what limits."""


def value(text: str) -> float | None:
    """A number as ncu prints it: "1,234.5"; None for what is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def in_base_units(number: float, unit: str, name: str) -> float:
    """Microseconds, bytes per second, percent."""
    if name == "us":
        return number * SCALE[unit[:1] if unit[:1] in "num" else "s"]
    if name == "dram_bytes_per_second":
        return number * PREFIX[unit[:1].upper() if unit[:1].upper() in "KMGT" else ""]
    if name == "issue_percent" and unit != "%" and number <= 1:
        return number * 100
    return number


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """ncu's raw page as CSV -> an entry per launch: METRICS, stalls (warps per issue), limits."""
    text = [line for line in lines if line.startswith('"')]
    if len(text) < 3:
        raise Failed("Nsight Compute printed no table")
    names, units, *rows = csv.reader(text)
    return [_entry(names, units, row) for row in rows if len(row) == len(names)]


def _entry(names: list[str], units: list[str], row: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kernel": row[names.index("Kernel Name")].split("(")[0]}
    for kept, patterns in METRICS.items():
        for pattern in patterns:
            found = [
                in_base_units(number, unit, kept)
                for name, unit, cell in zip(names, units, row, strict=True)
                if re.fullmatch(pattern, name) and (number := value(cell)) is not None
            ]
            if found:
                entry[kept] = max(found)
                break
    stalls: dict[str, float] = {}
    for name, cell in zip(names, row, strict=True):
        match, number = STALL.match(name), value(cell)
        if match and number is not None and not match[1].endswith("not_issued"):
            stalls[match[1]] = max(number, stalls.get(match[1], 0.0))
    stalls.pop("selected", None)
    top = sorted(stalls.items(), key=lambda pair: -pair[1])[:3]
    entry["stalls"] = {name: round(number, 3) for name, number in top}
    entry["limit"] = limit(entry)
    return entry


def limit(entry: dict[str, Any]) -> str:
    """What limits a launch, in words."""
    units = {
        "dram_percent": "memory's bandwidth", "tensor_percent": "the tensor cores",
        "issue_percent": "issue slots", "alu_percent": "the integer pipe",
    }  # fmt: skip
    busy = {what: entry[name] for name, what in units.items() if entry.get(name) is not None}
    most = max(busy, key=lambda what: busy[what], default="")
    if most and busy[most] >= BUSY:
        return f"{most} ({busy[most]:.0f}% busy)"
    stall = next(iter(entry["stalls"]), "")
    words = f"waits for {REASONS.get(stall, stall.replace('_', ' '))}" if stall else "unknown"
    if most:
        words += f"; busiest: {most}, {busy[most]:.0f}%"
    if entry.get("occupancy_percent", 100.0) < 15:
        words += f"; only {entry['occupancy_percent']:.0f}% of the warps that fit"
    return words


def table(entries: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
    ]

    def percent(entry: dict[str, Any], name: str) -> str:
        return "" if entry.get(name) is None else f"{entry[name]:.0f}%"

    for entry in entries:
        stalls = ", ".join(f"{name} {number:.2f}" for name, number in entry["stalls"].items())
        cells = [
            entry.get("launch", ""), entry["kernel"], f"{entry.get('us', float('nan')):.1f}",
            *(percent(entry, f"{n}_percent") for n in SHARES),
            stalls, entry["limit"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def launch_all() -> None:
    """The launches that ncu is to see, once each, in the order of LAUNCHES."""
    import torch
    from gpu_kernels_bench import Bench, gemm

    from qig_serve.formats import SCHEMES
    from qig_serve.kernels import tuning, w3a16_dequantize

    bench, (n, k) = Bench(), SHAPE
    bench.load(n, k)
    prepared = {}
    for scheme, m in LAUNCHES:
        if scheme not in prepared:
            prepared[scheme] = tuning.random_linear(
                SCHEMES[scheme], n, k, torch.bfloat16, bench.device
            )
        p, tile = prepared[scheme], bench.tile(scheme, m)
        if tile.regime == "dequantize":  # cuBLAS is no kernel of ours
            w3a16_dequantize.dequantize(p["weight_planes"], p["scale_zero"], n, k, torch.bfloat16)
        else:
            x = torch.randn(m, k, dtype=torch.bfloat16, device=bench.device)
            gemm(scheme, x, n, tile)(p)
        torch.cuda.synchronize()


def run(context: Context) -> None:
    """Under ncu, if it is installed."""
    ncu = shutil.which("ncu") or next(
        (str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/ncu"))), None
    )
    if ncu is None:
        raise Failed("Nsight Compute (ncu) is not installed")
    command = [
        ncu, "--clock-control", "none", "--set", "full", "-k", f"regex:{KERNELS}", "--csv",
        "--page", "raw", sys.executable, __file__,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, context.left() - 2)
        )
    except subprocess.TimeoutExpired as error:
        raise Failed("Nsight Compute did not end in time") from error
    lines = done.stdout.splitlines()
    try:
        entries = parse(lines)
    except Failed as error:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise Failed(f"{error}, but: {said[-1][:200]}") from error
    for (scheme, m), entry in zip(LAUNCHES, entries, strict=False):
        entry["launch"] = f"{scheme} M={m}"
    context.results.write(
        "counters", {"shape": SHAPE, "launches": entries, "table": table(entries)}
    )
    print(table(entries), flush=True)
    if len(entries) != len(LAUNCHES):
        raise Failed(f"Nsight Compute saw {len(entries)} of {len(LAUNCHES)} launches")


if __name__ == "__main__":
    launch_all()
