"""report.json, report.html and README.md (the model card) of a checkpoint.

All three are rendered from a QuantizationReport (report_data.py) by `write_reports`, which the
pipeline calls before it hashes and publishes the directory.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qig_serve.formats import get_scheme
from qig_serve.offline import plots
from qig_serve.offline.model_card import (
    all_warnings,
    front_matter,
    model_card,
    recovery_rows,
)
from qig_serve.offline.pictures import PICTURE_STYLE, TokenPicture, picture_html
from qig_serve.offline.report_data import REPORT_FILE, QuantizationReport

HTML_FILE = "report.html"
CARD_FILE = "README.md"


def write_reports(
    report: QuantizationReport,
    directory: Path,
    quantization_config: Mapping[str, Any],
    source_card: Path | None = None,
    pictures: Sequence[TokenPicture] = (),
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Writes the three files into the directory of a checkpoint in the making.

    `quantization_config` is what config.json will say; `source_card` is the source model's
    README.md, whose licence and languages are kept. `evaluation` as in `add_evaluation`.
    """
    data = report.model_dump(mode="json")
    if evaluation is not None:
        data["evaluation"] = dict(evaluation)
    _write(directory / REPORT_FILE, json.dumps(data, indent=1) + "\n")
    _write(directory / HTML_FILE, render_html(report, pictures, evaluation))
    inherited = front_matter(source_card) if source_card is not None else {}
    _write(directory / CARD_FILE, model_card(report, quantization_config, inherited, evaluation))


def add_evaluation(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Puts an evaluation into the three files of a finished checkpoint, and hashes it anew.

    `evaluation` is {"data": where the questions came from, "results": {"fp": R, name: R}} with R
    as EvaluationResult.to_json gives it.
    """
    from qig_serve.offline.checkpoint import write_hashes

    data = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    data.pop("evaluation", None)
    report = QuantizationReport.model_validate(data)
    page = (directory / HTML_FILE).read_text(encoding="utf-8")
    before, _, rest = page.partition(_EVALUATION_START)
    _, _, after = rest.partition(_EVALUATION_END)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ours = config.get("qig", config["quantization_config"])  # the first: compressed-tensors
    card = model_card(report, ours, front_matter(directory / CARD_FILE), evaluation)
    data["evaluation"] = dict(evaluation)
    _write(directory / HTML_FILE, before + _evaluation(evaluation) + after)
    _write(directory / CARD_FILE, card)
    _write(directory / REPORT_FILE, json.dumps(data, indent=1) + "\n")
    write_hashes(directory)


def _write(path: Path, text: str) -> None:
    """Beside the target, then renamed onto it: no half file is ever seen."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
    pictures: Sequence[TokenPicture] = (),
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """One self-contained page: nothing in it is loaded from elsewhere, and no script runs."""
    title = html.escape(f"{Path(report.model).name} in {report.scheme} ({report.method})")
    sections = [
        _warnings(report),
        _overview(report),
        _evaluation(evaluation),
        _losses(report),
        _equalization(report),
        _attribution(report),
        _section("What the weights look at", *map(picture_html, pictures)),
        _cost(report),
        _left_alone(report),
        _section(
            "Recipe",
            f"<pre>{html.escape(yaml.safe_dump(report.recipe, sort_keys=False))}</pre>",
        ),
    ]
    return _page(title, sections)


def picture_page(picture: TokenPicture) -> str:
    """A page of one sample alone: what `qig-serve attribute` writes."""
    return _page(html.escape(f"Token weights: {picture.name}"), [picture_html(picture)])


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
    facts = {
        # Where a model lay on the machine that quantized it is nobody's business.
        "Model": f"{_public_name(report.model)} ({report.family})",
        "Scheme, method": f"{report.scheme}, {report.method}",
        "Calibration": f"{calibration.get('samples', 0)} samples of {calibration.get('source')}",
        "Calibration hash": calibration.get("sha256"),
        "Tokens": ", ".join(f"{n} {kind}" for kind, n in tokens.items()) if tokens else None,
        "Seed": calibration.get("seed"),
        "Made by": report.producer,
    }
    items = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<dl>{items}</dl>"


def _public_name(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        section = _section(
            "Held-out questions",
            "<p>No evaluation was run: the figures below are the calibration's own. "
            "<code>qig-serve evaluate</code> measures the answers.</p>",
        )
    else:
        head, rows = recovery_rows(evaluation)
        source = html.escape(str(evaluation.get("data", "")))
        section = _section("Held-out questions", f"<p>Questions: {source}</p>", _table(head, rows))
    return _EVALUATION_START + section + _EVALUATION_END


def _losses(report: QuantizationReport) -> str:
    search = [
        [b.index, m.name, m.loss_module, _g(m.loss_rtn), _g(m.loss), _g(m.loss / m.loss_rtn)]
        for b in report.blocks
        for m in b.modules
        if m.loss_rtn > 0
    ]
    steps = plots.rounding_steps(report)
    linears = [
        [b.index, name, *(_g(values.get(step)) for step in steps)]
        for b in report.blocks
        for name, values in b.linears.items()
    ]
    outputs = [[b.index, _g(b.output_error)] for b in report.blocks]
    return _section(
        "Loss before and after",
        _figure(
            plots.loss_plot(report),
            "Loss of each searched module, on the calibration samples, over that of "
            "round-to-nearest (RTN) at the same bits.",
        ),
        _details(
            "Search losses",
            _table(["block", "searched", "loss at", "RTN", "after", "ratio"], search, 3),
        ),
        _figure(
            plots.rounding_plot(report) if steps else None,
            "Output error of the linears as a fraction of the output's energy, after each step.",
        ),
        _details("Errors of the linears", _table(["block", "linear", *steps], linears, 2)),
        _figure(
            plots.output_error_plot(report),
            "How far the hidden state of the quantized model has drifted after each block.",
        ),
        _details("Drift", _table(["block", "squared error / square"], outputs, 0)),
    )


def _equalization(report: QuantizationReport) -> str:
    rows = [[b.index, m.name, _g(m.exponent)] for b in report.blocks for m in b.modules]
    clip = [
        [b.index, name, _g(values["clip_ratio"])]
        for b in report.blocks
        for name, values in b.linears.items()
        if "clip_ratio" in values
    ]
    return _section(
        "Exponents and ranges",
        _figure(
            plots.exponent_plot(report),
            "Equalization exponent r: scales are the mean activation to the power of r, 0 leaves "
            "the weights as they are.",
        ),
        _details("Exponents", _table(["block", "searched", "exponent"], rows, 2)),
        _details(
            "Clip ratios (mean of range over min-max range)",
            _table(["block", "linear", "clip ratio"], clip, 2),
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
            f"{share.before_clip:.1%}",
            f"{share.after_clip:.1%}",
        ]
        for b in report.blocks
        for m in b.modules
        for kind, share in m.token_shares.items()
    ]
    head = ["block", "searched", "completeness error", "tokens", "number", "before", "after"]
    return _section(
        "Token weights",
        _figure(
            plots.token_share_plot(report),
            "Share of the weight by modality across depth. Clipping to the quartile fences takes "
            "weight from outliers: the distance of a dotted line from its full one is what was "
            "clipped. Special and template tokens take no part.",
        ),
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


def _cost(report: QuantizationReport) -> str:
    stages: dict[str, float] = {}
    for block in report.blocks:
        for module in block.modules:
            for stage, seconds in module.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
    inside = sum(stages.values())
    blocks = sum(b.seconds for b in report.blocks)
    rows: list[Sequence[Any]] = [[k.replace("_", " "), f"{v:.1f}"] for k, v in stages.items()]
    rows += [
        ["rounding, packing and the rest of the blocks", f"{max(0.0, blocks - inside):.1f}"],
        ["loading, calibration data and writing", f"{max(0.0, report.seconds - blocks):.1f}"],
        ["all", f"{report.seconds:.1f}"],
    ]
    host = max((b.host_bytes for b in report.blocks), default=0)
    device = max((b.device_bytes for b in report.blocks), default=0)
    memory = f"<p>Peak memory: {_gib(host)} host, {_gib(device)} on the GPU.</p>"
    per_block = [
        [b.index, f"{b.seconds:.1f}", _gib(b.host_bytes), _gib(b.device_bytes)]
        for b in report.blocks
    ]
    return _section(
        "Time and memory",
        _table(["seconds spent on", ""], rows),
        memory,
        _details("By block", _table(["block", "seconds", "host", "GPU"], per_block)),
    )


def _left_alone(report: QuantizationReport) -> str:
    items = "".join(f"<li><code>{html.escape(name)}</code></li>" for name in report.left_alone)
    return _section(
        "Left in 16 bits",
        "<p>On purpose: vision tower, projector, embeddings and output head are small beside the "
        "decoder and do not bear few bits.</p>"
        if items
        else None,
        f"<ul>{items}</ul>" if items else None,
    )
