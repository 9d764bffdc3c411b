"""What several runs of `qig-serve compare` come to together.

    python tests/benchmarks/pool_compare.py [--ours qig+] FILE.json ...

Prints a table for each file and scheme (exact match and same answer in percent, KL in nats per
token, KL of ours over that of the method, McNemar p of ours against it), then ours against each
method over all files: discordant questions are added up, and tested as one (exact McNemar).
Methods are compared within their run only. Of a scheme that several files of one model hold, give
one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qig_serve.evaluation.statistics import Paired, mcnemar


def add_up(tests: list[dict[str, Any]]) -> Paired:
    """One test over the questions of several."""
    names = ("n", "right_to_wrong", "wrong_to_right")
    return mcnemar(*(sum(t[name] for t in tests) for name in names))


def tests_of(run: dict[str, Any], ours: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(scheme, other method) -> test of ours against it."""
    return {(t["scheme"], t["first"]): t for t in run["pairwise"] if t["second"] == ours}


def percent(share: float | None) -> str:
    """Of questions; "-" where none was asked."""
    return "-" if share is None else f"{100 * share:.1f}"


def table(name: str, scheme: str, run: dict[str, Any], ours: str) -> str:
    """Markdown; a row per method."""
    rows = [s for s in run["summary"] if s["scheme"] == scheme]
    full = [f["exact_match"] for f in run["full_precision"].values()]
    exact = percent(None if None in full else sum(full) / len(full))
    own = next(s for s in rows if s["method"] == ours)
    rtn = next((s["kl_mean"] for s in rows if s["method"] == "rtn"), None)
    tests = tests_of(run, ours)
    lines = [f"{name}, {scheme} (full precision {exact}):", ""]
    lines += ["| method | exact | KL | same | ours / its KL | p | seconds |", "|---|" + "---|" * 6]
    for s in rows:
        test = tests.get((scheme, s["method"]))
        ratio = "-" if s is own else f"{own['kl_mean'] / s['kl_mean']:.2f}"
        p = f"{test['p_value']:.2g}" if test else "-"
        lines.append(
            f"| `{s['method']}` | {percent(s['exact_match'])} | {s['kl_mean']:.5f} | "
            f"{percent(s['agreement'])} | {ratio} | {p} | {s['seconds']:.0f} |"
        )
    others = [s["kl_mean"] for s in rows if s["method"] != ours]
    lines += ["", f"{ours}: {own['kl_mean'] / min(others):.2f} of the best other method's KL"]
    if rtn:
        lines[-1] += f"; {100 * (1 - own['kl_mean'] / rtn):.1f}% of RTN's is gone"
    return "\n".join(lines)


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--ours", default="qig+")
    args = parser.parse_args()
    pooled: dict[str, list[dict[str, Any]]] = {}
    for path in args.files:
        run = json.loads(path.read_text())
        for scheme in dict.fromkeys(s["scheme"] for s in run["summary"]):
            rows = [s for s in run["summary"] if s["scheme"] == scheme]
            methods = [s["method"] for s in rows if s["kl_mean"] is not None]
            if args.ours not in methods or len(methods) < 2 or len(methods) < len(rows):
                parser.error(
                    f"{path}, {scheme}: needs {args.ours} and another method, each with its KL, "
                    f"and has {', '.join(methods)}; name one of them by --ours, or compare again"
                )
            print(table(path.stem, scheme, run, args.ours), end="\n\n")
        for (_, method), test in tests_of(run, args.ours).items():
            pooled.setdefault(method, []).append(test)
    print(f"{args.ours} against each, over all of these:\n")
    print("| method | questions | points | 95% interval | p |", "|---|---|---|---|---|", sep="\n")
    for method, tests in pooled.items():
        t = add_up(tests)
        low, high = (f"{100 * x:+.1f}" for x in t.interval)
        points = f"{100 * t.difference:+.2f} | {low} to {high}"
        print(f"| `{method}` | {t.n} | {points} | {t.p_value:.2g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
