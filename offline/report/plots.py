"""The plots of report.html: matplotlib figures as inline SVG that follows the page's colours.

Every series differs by marker and dash as well as by colour (Okabe and Ito's palette, which
colour-blind people can distinguish), and every picture has a text alternative.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qig_serve.offline.results import experts_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qig_serve.offline.results import BlockReport, ModuleReport, QuantizationReport

# Drawn in these colours, then handed to the page's style sheet under these names: the same
# picture is readable on white and on black.
_INK = "#010203"
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")

STYLE = """
:root { --ink: #1b1b1b; --page: #ffffff; --line: #c8c8c8; --soft: #f2f2f2; --mark: 0, 114, 178;
  --s0: #0072b2; --s1: #b94f00; --s2: #007a59; --s3: #a2447c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --page: #161616; --line: #4a4a4a; --soft: #242424; --mark: 36, 120, 175;
    --s0: #56b4e9; --s1: #f08a3c; --s2: #2bc79a; --s3: #e39ac6; } }
"""


def figure(width: float = 9.0, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure and its axes, drawn in ink on nothing."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height))
    axes = fig.add_subplot()
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(axis="y", color=_INK, alpha=0.15)
    return fig, axes


def series(axes: Any, number: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """Line `number` of a plot: its marker and colour with dash are its own up to eight lines."""
    i = number % len(_SERIES)
    dash = _DASHES[(i + number // len(_SERIES)) % len(_DASHES)]
    marker = _MARKERS[number % len(_MARKERS)]
    axes.plot(x, y, color=_SERIES[i], marker=marker, ls=dash, label=label, ms=4, lw=1.5)


def finish(axes: Any, x: str, y: str, scale: str = "linear") -> None:
    """Axis names and legend; scale: of y."""
    axes.set_yscale(scale)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            labelcolor=_INK,
            frameon=False,
            fontsize="small",
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )


def svg(fig: Figure, alternative: str) -> str:
    """The figure as an inline <svg> with `alternative` as its title."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text; a fixed salt and no date make equal runs give equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alternative}):
        fig.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "var(--ink)")
    for i, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--s{i})")
    # Several figures share one page: their ids must not meet.
    prefix = "f" + re.sub(r"\W+", "", alternative)[:40]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    title = html.escape(alternative)
    opening = f'<svg role="img" aria-label="{title}" '
    text = text.replace("<svg ", opening, 1)
    end = text.index(">") + 1
    return f"{text[:end]}<title>{title}</title>{text[end:]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


Points = Sequence[tuple[int, str, float]]
"""(block, name of the line, value)."""


def _lines(axes: Any, points: Points, y: str) -> None:
    """One line per name, across depth."""
    for number, name in enumerate(dict.fromkeys(name for _, name, _ in points)):
        own = [(block, value) for block, other, value in points if other == name]
        series(axes, number, [p[0] for p in own], [p[1] for p in own], name)
    finish(axes, "block", y)


def _of_modules(
    report: QuantizationReport, value: Callable[[ModuleReport], float | None]
) -> Points:
    """A value of every searched module that has one, by its name."""
    found = [(b.index, m.name, value(m)) for b in report.blocks for m in b.modules]
    return sorted(
        ((index, name, v) for index, name, v in found if v is not None), key=lambda p: p[1]
    )


def loss_plot(report: QuantizationReport) -> str | None:
    """Search loss over round-to-nearest's, one line per module, across depth."""
    points = _of_modules(report, lambda m: m.loss / m.loss_rtn if m.loss_rtn > 0 else None)
    if not points:
        return None
    fig, axes = figure()
    axes.axhline(1, color=_INK, lw=1)
    _lines(axes, points, "loss / loss of RTN")
    axes.set_ylim(bottom=0)
    return svg(
        fig,
        f"Loss after the search over that of round-to-nearest, by module and block; the largest "
        f"ratio is {max(p[2] for p in points):.2f}, 1 would be no gain",
    )


def exponent_plot(report: QuantizationReport) -> str | None:
    """Chosen equalization exponents across depth."""
    points = _of_modules(report, lambda m: m.exponent)
    if not points:
        return None
    fig, axes = figure(height=2.4)
    _lines(axes, points, "exponent r")
    axes.set_ylim(-0.03, 1.03)
    return svg(fig, f"Chosen equalization exponents by module and block, {_range(points)}")


def clip_plot(report: QuantizationReport) -> str | None:
    """Mean clip ratio of the linears across depth, one line per kind of linear."""
    points = [
        (block.index, _kind(name), linear.clip_ratio)
        for block in report.blocks
        for name, linear in experts_together(block)
    ]
    if not points:
        return None
    fig, axes = figure(height=2.4)
    _lines(axes, points, "clip ratio")
    return svg(fig, f"Range over min-max range by linear and block, {_range(points)}")


def _kind(linear: str) -> str:
    """A linear's last name; of experts, which may stand beside one that sees every token, more."""
    return f"experts' {linear.rpartition('.')[2]}" if "*" in linear else linear.rpartition(".")[2]


def _range(points: Points) -> str:
    values = [p[2] for p in points]
    return f"between {min(values):.2f} and {max(values):.2f}"


def completeness_plot(report: QuantizationReport) -> str | None:
    """Relative error of the attribution integral across depth."""
    points = _of_modules(report, lambda m: m.completeness)
    if not points:
        return None
    fig, axes = figure(height=2.4)
    percent = [(block, name, 100 * value) for block, name, value in points]
    _lines(axes, percent, "error, %")
    axes.set_ylim(bottom=0)
    worst = max(p[2] for p in points)
    if worst > 1:
        # A small difference F(X) - F(X0) makes a huge relative error: one must not hide all.
        axes.set_yscale("symlog", linthresh=1)
    return svg(
        fig,
        f"Error of the attribution integral by module and block; the largest is {worst:.2%}",
    )


def _shares(block: BlockReport, modality: str, when: str) -> float:
    found = [m.token_shares[modality] for m in block.modules if modality in m.token_shares]
    return _mean([float(getattr(share, when)) for share in found]) if found else 0.0


def token_share_plot(report: QuantizationReport) -> str | None:
    """Share of the token weight by modality across depth, before and after clipping."""
    modalities = sorted({k for b in report.blocks for m in b.modules for k in m.token_shares})
    if not modalities:
        return None
    blocks = [b for b in report.blocks if any(m.token_shares for m in b.modules)]
    fig, axes = figure()
    index = [b.index for b in blocks]
    shares = []
    for number, modality in enumerate(modalities):
        before = [100 * _shares(b, modality, "before_clip") for b in blocks]
        after = [100 * _shares(b, modality, "after_clip") for b in blocks]
        colour, marker = _SERIES[number % 4], _MARKERS[number % len(_MARKERS)]
        for values, when, style in (
            (before, "before", {"ls": ":", "mfc": "none"}),
            (after, "after", {"ls": "-"}),
        ):
            label = f"{modality}, {when} clipping"
            axes.plot(index, values, color=colour, marker=marker, ms=5, label=label, **style)
        shares.append(f"{modality} {_mean(before):.0f}% before and {_mean(after):.0f}% after")
    axes.set_ylim(-3, 103)
    finish(axes, "block", "share of weight, %")
    return svg(
        fig, "Share of the token weight by modality across depth, clipping: " + "; ".join(shares)
    )


def rounding_plot(report: QuantizationReport) -> str | None:
    """Output error of the linears, rounded to nearest and by the method: means over a block's."""
    blocks = [block for block in report.blocks if block.linears]
    if not blocks:
        return None
    fig, axes = figure()
    nearest = [_mean([v.error_rtn for v in block.linears.values()]) for block in blocks]
    found = [_mean([v.error for v in block.linears.values()]) for block in blocks]
    index = [block.index for block in blocks]
    series(axes, 0, index, nearest, "RTN")
    series(axes, 1, index, found, report.method)
    finish(axes, "block", "error / energy", "log")
    return svg(
        fig,
        f"Output error of the linears, a mean over blocks: {_mean(nearest):.2g} rounded to "
        f"nearest, {_mean(found):.2g} by the method",
    )


def output_error_plot(report: QuantizationReport) -> str | None:
    """Accumulated error of the hidden state across depth."""
    if not any(b.output_error for b in report.blocks):
        return None
    fig, axes = figure(height=2.4)
    values = [b.output_error for b in report.blocks]
    series(axes, 0, [b.index for b in report.blocks], values, "hidden state")
    finish(axes, "block", "squared error / square", "log")
    return svg(
        fig,
        f"Error of the hidden state after each block of the quantized model, from {values[0]:.2g} "
        f"to {values[-1]:.2g} of its energy",
    )
