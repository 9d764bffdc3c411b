"""Our CPU linears against bf16 F.linear, in one run, on 4096 x 4096.

    python tests/benchmarks/bench_cpu.py [--n 4096 --k 4096 --threads 1 --json FILE]

Decoder linears in w3a16 and w4a8, and the vocabulary's tables in w8a16. They are timed in turns, so
that a busy machine slows all of them alike; medians. `cold` goes round several copies of the
weights that together exceed the last-level cache, as a model does.
Ratios are bf16's time over ours: above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from qig_serve import packing
from qig_serve.formats import get_scheme
from qig_serve.kernels import cpu

ROWS = (1, 4, 16, 32, 64, 256, 1024)
NAMES = ("w3a16", "w4a8", "w8a16")
GOALS = {("w3a16", 1): 3.0, ("w3a16", 256): 0.6, ("w4a8", 1): 5.0, ("w4a8", 256): 1.3}
GOALS |= {("w8a16", 1): 1.0, ("w8a16", 256): 1.0}
BITS_GOAL = {"w3a16": 5.0, "w4a8": 8.0, "w8a16": 8.1}

Layer = Callable[[torch.Tensor], torch.Tensor]


def quantized_layer(name: str, weight: torch.Tensor) -> tuple[Layer, float]:
    """A linear on a round-to-nearest weight [N, K], and the bits per weight it holds."""
    scheme = get_scheme(name)
    n, k = weight.shape
    scale, zero = packing.minmax_params(weight, scheme, torch.bfloat16)
    codes = packing.quantize(weight, scale, zero, scheme)
    tensors = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
    prepared = cpu.prepare(scheme, tensors, torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in prepared.values()) * 8 / (n * k)
    return (lambda x: cpu.linear(scheme, x, prepared, n, k, None)), held


def medians(layers: dict[str, list[Layer]], x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds per call; the layers take turns, and each goes round its copies."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(repeats + 1):
        for name, copies in layers.items():
            layer = copies[turn % len(copies)]
            start = time.perf_counter()
            layer(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def main() -> int:
    """Print the table; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=0, help="calls timed; 0: by M")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--copies", type=int, default=6, help="of the weights, for the cold times")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.randn(args.n, args.k) / args.k**0.5
    held = {}
    copies: dict[str, list[Layer]] = {name: [] for name in ("bf16", *NAMES)}
    for _ in range(args.copies):
        for name in NAMES:
            layer, held[name] = quantized_layer(name, weight)
            copies[name].append(layer)
        half = weight.to(torch.bfloat16, copy=True)
        copies["bf16"].append(lambda x, half=half: F.linear(x, half))

    print(
        f"{args.n} x {args.k}, {args.threads} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}; milliseconds per call, ratio to bf16"
    )
    for name, bits in held.items():
        print(f"{name}: {bits:.3f} bits held per weight, scales and compensation included")
    print(f"{'M':>5} {'':>5} {'bf16':>9}" + "".join(f" {name:>9} {'ratio':>6}" for name in NAMES))
    rows, missed = [], []
    for m in args.rows:
        x = torch.randn(m, args.k, dtype=torch.bfloat16)
        repeats = args.repeats or (60 if m <= 16 else 15 if m <= 256 else 5)
        for state in ("warm", "cold"):
            chosen = {name: c[:1] if state == "warm" else c for name, c in copies.items()}
            t = medians(chosen, x, repeats)
            ratio = {name: t["bf16"] / t[name] for name in NAMES}
            columns = "".join(f" {t[name] * 1e3:9.3f} {ratio[name]:6.2f}" for name in NAMES)
            print(f"{m:>5} {state:>5} {t['bf16'] * 1e3:9.3f}{columns}", flush=True)
            rows.append(
                {
                    "m": m,
                    "state": state,
                    "milliseconds": {k: v * 1e3 for k, v in t.items()},
                    "ratio": ratio,
                }
            )
            missed += [
                f"{name} at M={m}: {ratio[name]:.2f}, goal {goal}"
                for (name, goal_m), goal in GOALS.items()
                if goal_m == m and state == "warm" and ratio[name] < goal
            ]
    missed += [
        f"{name} holds {bits:.2f} bits per weight, goal {BITS_GOAL[name]}"
        for name, bits in held.items()
        if round(bits, 1) > BITS_GOAL[name]
    ]
    if args.json:
        result = {
            "n": args.n,
            "k": args.k,
            "threads": args.threads,
            "bits_held": held,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "rows": rows,
            "missed": missed,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("every goal is met" if not missed else "missed: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
