"""Results for people: one rich table with a column per model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qig_serve.evaluation import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qig_serve.evaluate import EvaluationResult


def percent(share: float | None, signed: bool = False) -> str:
    """0.1234 -> "12.3%" ("+12.3" points when signed); "-" for None."""
    if share is None:
        return "-"
    return f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}%"


def small(value: float | None) -> str:
    """A number that may be tiny, in three significant digits; "-" for None."""
    return "-" if value is None else f"{value:.3g}"


def results_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Exact match overall and by type, transitions, KL and agreement, with a column per model."""
    from rich.table import Table

    from qig_serve.evaluate import shown_name

    table = Table()
    table.add_column("")
    for name in results:
        table.add_column(shown_name(name), justify="right")
    columns = list(results.values())
    kinds = sorted({kind for r in columns for kind in r.by_type()})

    def row(label: str, cells: list[str]) -> None:
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)

    row("questions", [str(len(r.scored)) for r in columns])
    row("failed requests", [str(len(r.failures)) if r.failures else "-" for r in columns])
    row("exact match", [percent(r.exact_match if r.scored else None) for r in columns])
    for kind in kinds:
        found = [r.by_type().get(kind, (0, None)) for r in columns]
        row(f"  {kind} ({max(n for n, _ in found)})", [percent(share) for _, share in found])
    pairs = [r.paired for r in columns]
    row(
        "against full precision, points", [percent(p.difference, True) if p else "-" for p in pairs]
    )
    row(
        "  95% interval",
        [f"{100 * p.interval[0]:+.1f} to {100 * p.interval[1]:+.1f}" if p else "-" for p in pairs],
    )
    row("  right -> wrong", [str(p.right_to_wrong) if p else "-" for p in pairs])
    row("  wrong -> right", [str(p.wrong_to_right) if p else "-" for p in pairs])
    row("  McNemar p", [small(p.p_value) if p else "-" for p in pairs])
    row("same whole answer", [percent(r.agreement) for r in columns])
    kls = [r.divergence for r in columns]
    row("KL, mean (nats per token)", [small(d.kl_mean) if d else "-" for d in kls])
    row("  standard error", [small(d.kl_se) if d else "-" for d in kls])
    row("  median", [small(d.kl_median) if d else "-" for d in kls])
    row("  99th percentile", [small(d.kl_p99) if d else "-" for d in kls])
    row("  largest", [small(d.kl_max) if d else "-" for d in kls])
    row("error of final states", [small(d.state_error) if d else "-" for d in kls])
    row("  standard error", [small(d.state_error_se) if d else "-" for d in kls])
    row("top-1 agreement", [percent(d.top1) if d else "-" for d in kls])
    row("answer perplexity ratio", [f"{d.perplexity_ratio:.4f}" if d else "-" for d in kls])
    records = [r.to_json() for r in columns]
    row("empty answers", [str(r["empty"] or "-") for r in records])
    row("repeating answers", [str(r["repeating"] or "-") for r in records])
    if any(r.scheme for r in columns):
        # A checkpoint made elsewhere may not list what it was calibrated on: then say so.
        seen = [r.calibration_overlap for r in columns]
        row(
            "questions calibrated on",
            [
                "-" if not r.scheme else "unknown" if ids is None else str(len(ids))
                for r, ids in zip(columns, seen, strict=True)
            ],
        )
    return table


@contextmanager
def progress_bars(
    console: Console, quiet: bool, unit: str = "questions"
) -> Iterator[Progress | None]:
    """A bar per stage on a terminal, a line per stage elsewhere; None when quiet."""
    if quiet:
        yield None
        return
    from rich import progress as rich_progress

    seen: dict[str, int] = {}
    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen[what] = int(bars.add_task(what, total=total))
                if not console.is_terminal:
                    console.print(
                        f"{what}: {total} {unit.removesuffix('s') if total == 1 else unit}",
                        highlight=False,
                        markup=False,
                    )
            bars.update(seen[what], completed=done)  # type: ignore[arg-type]

        yield progress


def print_whole(console: Console, table: Table) -> None:
    """Prints a table as wide as its figures are: cut to the terminal they would be lost."""
    from rich.console import Console
    from rich.measure import Measurement

    as_written: Any = {"markup": False, "emoji": False}  # a type of questions may be "[/b]"
    endless = Console(width=1000, **as_written)
    needed = Measurement.get(endless, endless.options, table).maximum
    width = max(needed, console.width)
    Console(file=console.file, quiet=console.quiet, width=width, **as_written).print(table)
