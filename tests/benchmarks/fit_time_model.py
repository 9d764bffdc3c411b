"""Fit kernels/time_model.py to the kernels that were timed on an H200, and say how far it is off.

    python tests/benchmarks/fit_time_model.py [--leave-out LAYER] [--rows FILE ...] [--present]
        [--beside]

Prints the fitted numbers (time_model.Fit holds them), the error of each row by kind of kernel, and
of how many pairs of tiles of one row (layer, M, scheme) the faster is found. --leave-out: fit
without a layer's rows, and judge on them alone. --present: judge the numbers that are there.
--beside: instead, a table of the four linears' sums: measured with the kernels of then, and
predicted for those of now. The rows are in results/kernel-times-H200.json: 142 timings of 28
kernels, some of which are no longer in the code; --rows names others, or several: `make gpu` leaves
such a file of every run (kernel-times-<card>-<commit>.json), with what its card's memory reaches.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from qig_serve.kernels.sass import Counts
from qig_serve.kernels.time_model import FIT, GPUS, Fit, Work, predict

ROWS = Path(__file__).parent / "results" / "kernel-times-H200.json"
NAMES = [field.name for field in dataclasses.fields(Fit)]
LOW = dict(
    dict.fromkeys(NAMES, 0.0), launch=0.5, issue=0.8, memory=0.8, cache=4, norm=1.05, bf16=0.3
)
HIGH = dict(
    launch=6, early=2, chain=5, chain_tensor=2, issue=3, memory=1.6, cache=80, bf16=1.0, int8=1.2,
    shared_tile=6, partial=50, end=20, norm=12,
)  # fmt: skip
WIDE = 1.96
"""Microseconds of 64-bit divisions, which the timed stream-K kernels had at their start."""
CLOSE = 0.03  # tiles whose times differ by less are no pair to be distinguished


def predicted(row: dict[str, Any], fit: Fit) -> float:
    """Microseconds of a row by the model."""
    gpu = dataclasses.replace(GPUS[row["target"]], early=row["early"], **row["gpu"])
    counts, work = Counts(**row["counts"]), Work(**row["work"])
    return predict(work, counts, gpu, fit).microseconds + (WIDE if row["wide"] else 0)


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows of all files, each with the counts of its kernel and its card's own numbers."""
    rows = []
    for path in paths:
        data = json.loads(path.read_text())
        card = {"gpu": data.get("gpu", {}), "target": data.get("target", 90)}
        for row in data["rows"]:
            counts = data["counts"][row["kernel"]]
            shape = (row.get("n"), row.get("k"), path.name)
            rows.append({**row, "counts": counts, "shape": shape, **card})
    return rows


def fitted(rows: list[dict[str, Any]]) -> Fit:
    """The least squares of the times' logarithms, from the present numbers."""

    def residuals(values: np.ndarray) -> np.ndarray:
        fit = Fit(**dict(zip(NAMES, values, strict=True)))
        return np.log([predicted(row, fit) / row["us"] for row in rows])

    low, high = (np.array([bounds[name] for name in NAMES]) for bounds in (LOW, HIGH))
    start = np.clip(dataclasses.astuple(FIT), low + 1e-6, high - 1e-6)
    solution = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return Fit(**{n: round(float(v), 3) for n, v in zip(NAMES, solution.x, strict=True)})


def print_beside(data: dict[str, Any]) -> None:
    """Microseconds of a Qwen2-VL-7B layer's linears: cuBLAS, then measured, now predicted."""
    from qig_serve.kernels import compile_report

    print("|   M | cuBLAS bf16 | w3a16 measured | predicted | w4a8 measured | predicted |")
    for m in (1, 8, 16, 32, 64, 128, 256, 512):
        cublas = sum(by_m[str(m)] for by_m in data["cublas_us"].values())
        line = f"| {m:>3} | {cublas:>11.0f} |"
        for scheme, width in (("w3a16", 14), ("w4a8", 13)):
            measured = sum(by_m[str(m)] for by_m in data["served_us"][scheme].values())
            now = sum(p.microseconds for p in compile_report.predict(90, scheme, m))
            then = f"{measured:.0f} ({cublas / measured:.2f}x)"
            line += f" {then:>{width}} | {f'{now:.0f} ({cublas / now:.2f}x)':>9} |"
        print(line, flush=True)


def main() -> None:
    """Fit and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave-out", metavar="LAYER")
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS], metavar="FILE")
    parser.add_argument("--present", action="store_true")
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args()
    if options.beside:
        return print_beside(json.loads(ROWS.read_text()))
    rows = read(options.rows)
    left = [row for row in rows if row["layer"] != options.leave_out]
    fit = FIT if options.present else fitted(left)
    judged = [row for row in rows if options.leave_out in (None, row["layer"])]
    print(fit)
    by_kind, by_row = collections.defaultdict(list), collections.defaultdict(list)
    for row in judged:
        time = predicted(row, fit)
        kind = " ".join(row["kernel"].split()[:2])
        by_kind[kind].append(abs(time / row["us"] - 1))
        by_row[row["layer"], row["shape"], row["m"], row["scheme"]].append((row["us"], time))
    every = [error for errors in by_kind.values() for error in errors]
    print(f"{len(every)} rows: median error {np.median(every):.1%}, 90% below "
          f"{np.quantile(every, 0.9):.1%}")  # fmt: skip
    for kind, errors in sorted(by_kind.items()):
        print(f"  {kind:<16} {len(errors):>3} rows, median error {np.median(errors):.1%}")
    measured, times = zip(*[pair for pairs in by_row.values() for pair in pairs], strict=True)
    print(f"rank correlation of all rows {spearmanr(measured, times).statistic:.3f}")
    pairs = [
        (a, b)
        for found in by_row.values()
        for i, a in enumerate(found)
        for b in found[:i]
        if abs(math.log(a[0] / b[0])) > CLOSE
    ]
    right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    print(f"pairs of tiles of a row in the right order: {right} of {len(pairs)}")
    lost = [min(f, key=lambda p: p[1])[0] / min(p[0] for p in f) - 1 for f in by_row.values()]
    print(f"taking the tile that the model puts first costs {np.mean(lost):.1%} on average")


if __name__ == "__main__":
    main()
