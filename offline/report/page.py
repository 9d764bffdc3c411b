"""report.html: one self-contained page about a quantization; nothing in it is loaded, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from qig_serve.formats import get_scheme
from qig_serve.offline.report import plots
from qig_serve.offline.report.card import all_warnings, public_name, published, recovery_rows
from qig_serve.offline.report.drawing import PICTURE_STYLE, picture_html
from qig_serve.offline.report.pictures import TokenPicture
from qig_serve.offline.results import QuantizationReport, experts_together

_EVALUATION_START, _EVALUATION_END = "<!-- evaluation -->", "<!-- end of evaluation -->"


STYLE = (
    plots.STYLE
    + PICTURE_STYLE
    + """
body { background: var(--page); color: var(--ink); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg, img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .note { font-size: 0.9rem; opacity: 0.85; }
.scroll { overflow-x: auto; } code, pre { font-size: 0.85rem; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; }
.warnings { border-left: 6px solid var(--s1); background: var(--soft); padding: 0.5rem 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""
)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: int = 1) -> str:
    """A table; columns from `numbers` on are numbers. Empty without rows."""
    if not rows:
        return ""

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numbers else ''}>{html.escape(str(v))}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def _section(title: str, *content: str | None) -> str:
    """A section of what there is; nothing if there is nothing."""
    there = [c for c in content if c]
    return f"<section><h2>{title}</h2>{''.join(there)}</section>" if there else ""


def _figure(picture: str | None, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>" if picture else ""


def _g(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count else "-"


def render_html(
    report: QuantizationReport,
    pictures: Sequence[TokenPicture],
) -> str:
    """One self-contained page: nothing in it is loaded from elsewhere, and no script runs."""
    name = public_name(report.model).rpartition("/")[2]
    title = html.escape(f"{name} in {report.scheme} ({report.method})")
    sections = [
        _warnings(report),
        _overview(report),
        _evaluation(None),
        _losses(report),
        _equalization(report),
        _attribution(report),
        _section("What the weights look at", *map(picture_html, pictures)),
        _cost(report),
        _left_alone(report),
        _section("Recipe", f"<pre>{html.escape(_recipe(report))}</pre>"),
    ]
    return _page(title, sections)


def _recipe(report: QuantizationReport) -> str:
    return yaml.safe_dump(published(report.recipe), sort_keys=False)


def with_evaluation(page: str, evaluation: Mapping[str, Any]) -> str:
    """A page of `render_html` with an evaluation in it."""
    before, _, rest = page.partition(_EVALUATION_START)
    _, _, after = rest.partition(_EVALUATION_END)
    return before + _evaluation(evaluation) + after


def picture_page(picture: TokenPicture, model: str, scheme: str) -> str:
    """A page of one sample alone: what `qig-serve attribute` writes."""
    title = f"Token weights of {public_name(model)} for {scheme}"
    return _page(html.escape(title), [picture_html(picture)])


def _page(title: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n" + "\n".join(s for s in sections if s) + "\n</body></html>\n"
    )


def _warnings(report: QuantizationReport) -> str:
    lines = all_warnings(report)
    if not lines:
        return '<p class="note">No warnings: no step fell back to a simpler one.</p>'
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="warnings" role="alert"><h2>Warnings</h2><ul>{items}</ul></div>'


def _overview(report: QuantizationReport) -> str:
    calibration = report.calibration
    tokens = calibration.get("tokens")
    source = public_name(str(calibration.get("source")))
    facts = {
        "Model": f"{public_name(report.model)} ({report.family})",
        "Scheme, method": f"{report.scheme}, {report.method}",
        "Size": report.size(),
        "Calibration": f"{calibration.get('samples', 0)} samples of {source}",
        "Calibration hash": calibration.get("sha256"),
        "Tokens": f"{tokens['image']} image, {tokens['text']} text, {tokens['special']} template"
        if tokens
        else None,
        "Seed": calibration.get("seed"),
        "Made by": report.producer,
    }
    items = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<dl>{items}</dl>"


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        section = _section(
            "Held-out questions",
            "<p>No evaluation was run: the figures below are the calibration's own. "
            "<code>qig-serve evaluate</code> measures the answers.</p>",
        )
    else:
        head, rows = recovery_rows(evaluation)
        source = html.escape(public_name(str(evaluation.get("data", ""))))
        section = _section("Held-out questions", f"<p>Questions: {source}</p>", _table(head, rows))
    return _EVALUATION_START + section + _EVALUATION_END


def _losses(report: QuantizationReport) -> str:
    search = [
        [b.index, m.name, m.loss_module, _g(m.loss_rtn), _g(m.loss), _g(m.loss / m.loss_rtn)]
        for b in report.blocks
        for m in b.modules
        if m.loss_rtn > 0
    ]
    rounded = [
        (b.index, name, linear) for b in report.blocks for name, linear in experts_together(b)
    ]
    linears = [
        [index, name, _g(linear.error_rtn), _g(linear.error)] for index, name, linear in rounded
    ]
    validated = ("damping", "shift", "shift_damp", "outputs_damping", "outputs_held_out")
    shifts = [
        [index, name, *(_g(getattr(linear, field)) for field in validated)]
        for index, name, linear in rounded
        if linear.shift is not None
    ]
    chosen = ["damping", "shift", "damping of the shift", "damping of outputs", "outputs' cost"]
    outputs = [[b.index, _g(b.output_error)] for b in report.blocks]
    return _section(
        "Loss before and after",
        _figure(
            plots.loss_plot(report),
            "Loss of each searched module after equalization over that before it, on the "
            "calibration samples, both with weights rounded to nearest (RTN). What another way of "
            "rounding gains is in the errors below.",
        ),
        _details(
            "Search losses",
            _table(["block", "searched", "loss at", "RTN", "after", "ratio"], search, 3),
        ),
        _figure(
            plots.rounding_plot(report),
            "Output error of the linears as a fraction of the output's energy.",
        ),
        _details("Errors of the linears", _table(["block", "linear", "RTN", "after"], linears, 2)),
        _details(
            "Damping and target shift of the compensation, chosen by cross-validation; where "
            "outputs' cost is below 1 their errors make up for each other",
            _table(["block", "linear", *chosen], shifts, 2),
        ),
        _figure(
            plots.output_error_plot(report),
            "How far the hidden state of the quantized model has drifted after each block.",
        ),
        _details("Drift", _table(["block", "squared error / square"], outputs, 0)),
        "" if report.tuning is None else f"<p>Afterwards: {report.tuning.line()}.</p>",
        f"<p>{rare}.</p>" if (rare := report.rare_experts()) else "",
    )


def _equalization(report: QuantizationReport) -> str:
    rows = [[b.index, m.name, _g(m.exponent)] for b in report.blocks for m in b.modules]
    moved = report.recipe.get("equalize") == "channels"
    ranges = [
        [b.index, name, f"{linear.clip_ratio:.3f}", f"{linear.clipped:.2%}"]
        for b in report.blocks
        for name, linear in experts_together(b)
    ]
    return _section(
        "Exponents and clip ratios",
        _figure(
            plots.exponent_plot(report),
            "Equalization exponent r: scales are the mean activation to the power of r, 0 leaves "
            "the weights as they are."
            + (" From there each channel's scale was moved for itself." if moved else ""),
        ),
        _details(
            "Exponents",
            _table(["block", "searched", "exponent"], rows, 2),
        ),
        _figure(
            plots.clip_plot(report),
            "Clip ratio: the chosen range over the min-max range, a mean over the groups of a "
            "linear. Below 1, weights outside the range are clipped to its ends.",
        )
        or '<p class="note">Clip ratio 1 everywhere: ranges are min-max, and no weight is '
        "clipped.</p>",
        _details(
            "Clip ratios and clipped weights",
            _table(["block", "linear", "clip ratio", "weights clipped"], ranges, 2),
        ),
    )


def _attribution(report: QuantizationReport) -> str:
    rows = [
        [
            b.index,
            m.name,
            "-" if m.completeness is None else f"{m.completeness:.2%}",
            kind,
            share.tokens,
            share.clipped,
            f"{share.before_clip:.1%}",
            f"{share.after_clip:.1%}",
        ]
        for b in report.blocks
        for m in b.modules
        for kind, share in m.token_shares.items()
    ]
    head = ["block", "searched", "completeness error", "tokens", "number", "clipped"]
    head += ["before", "after"]
    return _section(
        "Token weights",
        _figure(
            plots.token_share_plot(report),
            "Share of the weight by modality across depth. Clipping to the quartile fences takes "
            "weight from outliers: the distance of a dotted line from its full one is what was "
            "clipped." + _special(report),
        ),
        _clipped_tokens(report),
        _figure(
            plots.completeness_plot(report),
            "Completeness: how far the integrated gradients are from summing to F(X) - F(X0). "
            + (
                "Below 2% the integral is right."
                if get_scheme(report.scheme).activation_bits is None
                else "With quantized activations the gradient is straight-through and the path "
                "short, so that even 100% is no sign of a wrong integral."
            ),
        ),
        _details("Shares and completeness", _table(head, rows, 2)),
    )


def _special(report: QuantizationReport) -> str:
    number = (report.calibration.get("tokens") or {}).get("special")
    count = f" ({number} in these samples)" if number else ""
    return f" Template tokens{count} take no part: their share is 0 throughout."


def _clipped_tokens(report: QuantizationReport) -> str | None:
    """How many tokens the quartile fences caught, by modality, over all searches."""
    totals: dict[str, list[int]] = {}
    for module in (m for b in report.blocks for m in b.modules):
        for kind, share in module.token_shares.items():
            total = totals.setdefault(kind, [0, 0])
            total[0] += share.clipped
            total[1] += share.tokens
    shares = [f"{c / n:.1%} of the {kind} tokens" for kind, (c, n) in totals.items() if n]
    if not shares:
        return None
    return f"<p>Moved onto the quartile fences, over all searches: {', '.join(shares)}.</p>"


def _cost(report: QuantizationReport) -> str:
    stages: dict[str, float] = {}
    for block in report.blocks:
        for module in block.modules:
            for stage, seconds in module.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
    inside = sum(stages.values())
    blocks = sum(b.seconds for b in report.blocks)
    rows: list[Sequence[Any]] = [[k.replace("_", " "), f"{v:.1f}"] for k, v in stages.items()]
    sweep, tuning = report.sweep_seconds, report.tuning.seconds if report.tuning else 0.0
    if sweep:
        rows.append(["the answers' gradients, before the blocks", f"{sweep:.1f}"])
    within = max(0.0, blocks - inside)
    rows.append(["rounding, packing and the rest of the blocks", f"{within:.1f}"])
    if tuning:
        rows.append(["tuning scales", f"{tuning:.1f}"])
    rest = max(0.0, report.seconds - blocks - sweep - tuning)
    rows += [
        ["loading, calibration data and writing", f"{rest:.1f}"],
        ["all", f"{report.seconds:.1f}"],
    ]
    host = max((b.host_bytes for b in report.blocks), default=0)
    device = max((b.device_bytes for b in report.blocks), default=0)
    estimate = ""
    if guess := report.estimate:
        estimate = f"<p>Estimated by the dry run: {guess['seconds']:.0f} s, "
        estimate += f"{_gib(int(guess['host_bytes']))} host memory.</p>"
    memory = f"<p>Peak memory: {_gib(host)} host"
    memory += f", {_gib(device)} on the GPU.</p>" if device else "; no GPU was used.</p>"
    per_block = [
        [b.index, f"{b.seconds:.1f}", _gib(b.host_bytes), _gib(b.device_bytes)]
        for b in report.blocks
    ]
    return _section(
        "Time and memory",
        _table(["seconds spent on", ""], rows),
        memory,
        estimate,
        _details("By block", _table(["block", "seconds", "host", "GPU"], per_block)),
    )


_REASONS = (
    (("lm_head", "output_layer"), "its errors go straight into the probabilities of the tokens"),
    (("embed", "wte"), "rows are looked up, not multiplied: fewer bits would save no time"),
    (("norm",), "vectors, no matrices"),
    (("per_layer",), "small, and it gives every block its tokens' own embedding"),
    (("gate", "router"), "small, and an error in it changes which experts are asked"),
    (("projector", "connector", "merger"), "small, and whatever is seen passes through it"),
    (("vision", "visual", "image"), "small beside the decoder, and its errors reach every image"),
)
"""Parts of a module's name -> why it is left alone; the first that fits the last part counts."""


def _reason(module: str) -> str:
    last = module.removesuffix(".proj").rpartition(".")[2]  # a router's linear
    for parts, reason in _REASONS:
        if any(part in last for part in parts):
            return reason
    return "no linear of a decoder block"


def _left_alone(report: QuantizationReport) -> str:
    rows = [[name, _reason(name)] for name in report.left_alone]
    if rows:
        rows.append(["norms and biases of the decoder blocks", "vectors, no matrices"])
    eight = ", ".join(report.eight_bit)
    return _section(
        "Left in 16 bits, and why",
        _table(["module", "why"], rows, 2) if rows else None,
        f"<p>In 8 bits, one scale for an entry of the vocabulary: {html.escape(eight)}.</p>"
        if eight
        else None,
    )
