"""report.json, report.html and README.md (the model card) of a checkpoint.

All three are rendered from a QuantizationReport (report_data.py) by `write_reports`, which the
pipeline calls before it hashes and publishes the directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qig_serve.offline.model_card import front_matter, model_card
from qig_serve.offline.pictures import TokenPicture
from qig_serve.offline.report_data import REPORT_FILE, QuantizationReport
from qig_serve.offline.report_page import render_html, with_evaluation

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
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ours = config.get("qig", config["quantization_config"])  # the first: compressed-tensors
    card = model_card(report, ours, front_matter(directory / CARD_FILE), evaluation)
    data["evaluation"] = dict(evaluation)
    _write(directory / HTML_FILE, with_evaluation(page, evaluation))
    _write(directory / CARD_FILE, card)
    _write(directory / REPORT_FILE, json.dumps(data, indent=1) + "\n")
    write_hashes(directory)


def _write(path: Path, text: str) -> None:
    """Beside the target, then renamed onto it: no half file is ever seen."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
