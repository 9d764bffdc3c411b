"""Methods side by side: figures over seeds, paired tests against full precision and each other.

A run is one scheme, method and seed. Seeds draw other calibration samples and, of the
demonstration set, other questions; pooled tests take all pairs of question and seed. With a fixed
question file the questions are the same for every seed, so pooled p values are then too small.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qig_serve.evaluate import EvaluationResult
from qig_serve.evaluation.statistics import Paired, paired
from qig_serve.evaluation.table import percent, small
from qig_serve.json_output import write_whole

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One quantization and its evaluation."""

    scheme: str
    method: str
    seed: int
    result: EvaluationResult
    seconds: float
    """Wall time of the quantization."""
    peak_bytes: int
    """Peak resident memory of the process that quantized."""


@dataclass(frozen=True)
class Summary:
    """One scheme and method over its seeds: means, and tests on all pairs."""

    scheme: str
    method: str
    seeds: int
    exact_match: float | None
    """None, as are the types and the test, where nothing was asked."""
    by_type: dict[str, float]
    against_full: Paired | None
    kl_mean: float | None
    kl_se: float | None
    """Standard error of the mean over seeds where there are several, else over answers."""
    kl_p99: float | None
    state_error: float | None
    top1: float | None
    agreement: float | None
    perplexity_ratio: float | None
    seconds: float
    peak_bytes: int


def asked(runs: Sequence[Run]) -> bool:
    """Whether there are answers, or KL alone."""
    return any(r.result.scored for r in runs)


def _correct(results: Sequence[EvaluationResult]) -> list[bool]:
    return [answer.correct for result in results for answer in result.answers]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _error(results: Sequence[EvaluationResult]) -> float | None:
    means = [r.divergence.kl_mean for r in results if r.divergence]
    if len(means) > 1:
        centre = sum(means) / len(means)
        spread = sum((m - centre) ** 2 for m in means) / (len(means) - 1)
        return math.sqrt(spread / len(means))
    return results[0].divergence.kl_se if results[0].divergence else None


def summarize(runs: Sequence[Run], full: Mapping[int, EvaluationResult]) -> list[Summary]:
    """A summary per scheme and method, in the order of the runs. `full`: seed -> full precision."""
    out = []
    for scheme, method in dict.fromkeys((r.scheme, r.method) for r in runs):
        own = [r for r in runs if (r.scheme, r.method) == (scheme, method)]
        results = [r.result for r in own]
        were_asked = asked(own)
        kinds = results[0].by_type()  # none where nothing was asked
        divergence = [r.divergence for r in results]
        out.append(
            Summary(
                scheme,
                method,
                len(own),
                sum(r.exact_match for r in results) / len(results) if were_asked else None,
                {k: _mean([r.by_type()[k][1] for r in results]) or 0.0 for k in kinds},
                paired(_correct([full[r.seed] for r in own]), _correct(results))
                if were_asked
                else None,
                _mean([d.kl_mean if d else None for d in divergence]),
                _error(results),
                _mean([d.kl_p99 if d else None for d in divergence]),
                _mean([d.state_error if d else None for d in divergence]),
                _mean([d.top1 if d else None for d in divergence]),
                _mean([r.agreement for r in results]),
                _mean([d.perplexity_ratio if d else None for d in divergence]),
                sum(r.seconds for r in own) / len(own),
                max(r.peak_bytes for r in own),
            )
        )
    return out


def pairwise(runs: Sequence[Run], scheme: str) -> dict[tuple[str, str], Paired]:
    """(first, second) -> test of the second method against the first, pooled over seeds."""
    methods = list(dict.fromkeys(r.method for r in runs if r.scheme == scheme))

    def correct(method: str) -> list[bool]:
        own = [r for r in runs if (r.scheme, r.method) == (scheme, method)]
        return _correct([r.result for r in sorted(own, key=lambda r: r.seed)])

    answers = {m: correct(m) for m in methods}
    return {(a, b): paired(answers[a], answers[b]) for a in methods for b in methods if a != b}


def to_json(runs: Sequence[Run], full: Mapping[int, EvaluationResult]) -> dict[str, Any]:
    """Everything, JSON-ready; models by name, since their folders may be gone."""

    def to_record(result: EvaluationResult) -> dict[str, Any]:
        return {**result.to_json(), "model": Path(result.model).name}

    return {
        "full_precision": {str(seed): to_record(result) for seed, result in full.items()},
        "summary": [dataclasses.asdict(s) for s in summarize(runs, full)],
        "pairwise": [
            {"scheme": scheme, "first": a, "second": b, **dataclasses.asdict(test)}
            for scheme in dict.fromkeys(r.scheme for r in runs if asked(runs))
            for (a, b), test in pairwise(runs, scheme).items()
        ],
        "runs": [
            to_record(r.result)  # which knows of no method if its checkpoint is an ordinary model
            | {
                "scheme": r.scheme,
                "method": r.method,
                "seed": r.seed,
                "seconds": r.seconds,
                "peak_bytes": r.peak_bytes,
            }
            for r in runs
        ],
    }


def _table(title: str, columns: Sequence[str], left: int = 2) -> Table:
    """An empty table; its first `left` columns hold names. Two-word heads take two lines."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def _add_by_scheme(table: Table, rows: Sequence[tuple[str, ...]]) -> None:
    for i, row in enumerate(rows):
        if i and row[0] != rows[i - 1][0]:
            table.add_section()
        table.add_row(*row)


def answers_table(runs: Sequence[Run], full: Mapping[int, EvaluationResult]) -> Table:
    """Exact match of all schemes and methods, and what they lose against full precision."""
    table = _table(
        "exact match, mean over seeds; points against full precision, McNemar p",
        ["scheme", "method", "exact\nmatch", "points", "95% interval", "p", "same\nanswer"],
    )
    share = sum(r.exact_match for r in full.values()) / len(full)
    rows: list[tuple[str, ...]] = [("full", "-", percent(share), *"----")]
    for s in summarize(runs, full):
        test = s.against_full
        assert test is not None  # something was asked
        low, high = (100 * end for end in test.interval)
        points, interval = percent(test.difference, signed=True), f"{low:+.1f} to {high:+.1f}"
        match, same = percent(s.exact_match), percent(s.agreement)
        rows.append((s.scheme, s.method, match, points, interval, small(test.p_value), same))
    _add_by_scheme(table, rows)
    return table


def distance_table(runs: Sequence[Run], full: Mapping[int, EvaluationResult]) -> Table:
    """How far from full precision all schemes and methods are, and what they cost."""
    table = _table(
        "KL to full precision in nats per token; time and peak memory of quantizing",
        ["scheme", "method", "KL", "standard\nerror", "state\nerror", "top-1", "seconds", "GiB"],
    )
    rows = [
        (
            s.scheme,
            s.method,
            *map(small, (s.kl_mean, s.kl_se, s.state_error)),
            percent(s.top1),
            f"{s.seconds:.0f}",
            f"{s.peak_bytes / 2**30:.1f}",
        )
        for s in summarize(runs, full)
    ]
    _add_by_scheme(table, rows)
    return table


def types_table(runs: Sequence[Run], full: Mapping[int, EvaluationResult], scheme: str) -> Table:
    """Exact match by question type, a column for each method of the scheme."""
    summaries = [s for s in summarize(runs, full) if s.scheme == scheme]
    title = f"{scheme}: exact match by question type"
    table = _table(title, ["", "full", *(s.method for s in summaries)], left=1)
    for kind in sorted({kind for s in summaries for kind in s.by_type}):
        whole = _mean([r.by_type()[kind][1] for r in full.values() if kind in r.by_type()])
        table.add_row(kind, percent(whole), *(percent(s.by_type.get(kind)) for s in summaries))
    return table


def pairwise_table(runs: Sequence[Run], scheme: str) -> Table:
    """Points that the method of the row wins over that of the column, with McNemar p."""
    tests = pairwise(runs, scheme)
    methods = list(dict.fromkeys(r.method for r in runs if r.scheme == scheme))
    title = f"{scheme}: row less column, points (McNemar p)"
    table = _table(title, ["", *methods], left=1)
    for row in methods:
        cells = []
        for column in methods:
            test = tests.get((column, row))
            cells.append(f"{100 * test.difference:+.1f} ({test.p_value:.2g})" if test else "-")
        table.add_row(row, *cells)
    return table


_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "os^Dv*PX"


def plot(runs: Sequence[Run], full: Mapping[int, EvaluationResult], path: Path) -> None:
    """KL and exact match, a panel per scheme and a point per seed; format by suffix.

    Methods are distinguished by their place and marker as well as by colour.
    """
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(r.scheme for r in runs))
    methods = list(dict.fromkeys(r.method for r in runs))
    fig = Figure(figsize=(3.2 + 2.2 * len(schemes), 3 + 3 * asked(runs)), layout="constrained")
    grid = fig.subplots(1 + asked(runs), len(schemes), squeeze=False)
    share = 100 * sum(r.exact_match for r in full.values()) / len(full)

    def kl(run: Run) -> float | None:
        return run.result.divergence.kl_mean if run.result.divergence else None

    def exact(run: Run) -> float | None:
        return 100 * run.result.exact_match

    measures: list[tuple[str, Callable[[Run], float | None]]] = [
        ("KL, nats per token", kl),
        ("exact match, %", exact),
    ]
    for line, (label, measure) in zip(grid, measures, strict=False):
        for axes, scheme in zip(line, schemes, strict=True):
            for i, method in enumerate(methods):
                values = [
                    v
                    for r in runs
                    if (r.scheme, r.method) == (scheme, method) and (v := measure(r)) is not None
                ]
                axes.plot(
                    [i] * len(values),
                    values,
                    ls="none",
                    marker=_MARKERS[i % len(_MARKERS)],
                    color=_COLORS[i % len(_COLORS)],
                )
            axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
            axes.set_title(scheme)
            axes.grid(axis="y", alpha=0.3)
            if measure is kl:
                if any((kl(r) or 0) > 0 for r in runs if r.scheme == scheme):
                    axes.set_yscale("log")
            else:
                axes.axhline(share, color="black", ls="--", lw=1, label="full precision")
        line[0].set_ylabel(label)
    if asked(runs):
        grid[1][0].legend(fontsize="small")
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=120, format=path.suffix[1:])
    write_whole(path, drawn.getvalue())
