"""report.json, report.html and README.md (the model card) of a checkpoint.

All three are rendered from a QuantizationReport (results.py) by `write_reports`, before the
directory is hashed and published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qig_serve.model_directory import read_config
from qig_serve.offline.disk import replace_files, write_text
from qig_serve.offline.report.card import front_matter, model_card, published
from qig_serve.offline.report.page import render_html, with_evaluation
from qig_serve.offline.report.pictures import TokenPicture
from qig_serve.offline.results import REPORT_FILE, QuantizationReport

HTML_FILE = "report.html"
CARD_FILE = "README.md"


def write_reports(
    report: QuantizationReport,
    directory: Path,
    quantization_config: Mapping[str, Any],
    source_card: Path | None = None,
    pictures: Sequence[TokenPicture] = (),
) -> None:
    """Writes the three files into the directory of a checkpoint in the making.

    `quantization_config` is what config.json will say; `source_card` is the source model's
    README.md, whose licence and languages are kept.
    """
    data = report.model_dump(mode="json")
    write_text(directory / REPORT_FILE, json.dumps(data, indent=1) + "\n")
    write_text(directory / HTML_FILE, render_html(report, pictures))
    inherited = front_matter(source_card) if source_card is not None else {}
    write_text(directory / CARD_FILE, model_card(report, quantization_config, inherited, None))


def add_evaluation(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Puts an evaluation into the three files of a finished checkpoint, all at once.

    `evaluation` is {"data": where the questions came from, "results": {"fp": R, name: R}} with R
    as EvaluationResult.to_json gives it. UserError where the disk does not take it; the checkpoint
    is then as it was. What names a path there is put down by its last part.
    """
    results = {name: published(result) for name, result in evaluation["results"].items()}
    evaluation = {**published(evaluation), "results": results}
    data = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    data.pop("evaluation", None)
    report = QuantizationReport.model_validate(data)
    page = (directory / HTML_FILE).read_text(encoding="utf-8")
    config = read_config(directory)
    ours = config.get("qig", config["quantization_config"])  # the first: compressed-tensors
    data["evaluation"] = dict(evaluation)
    replace_files(
        directory,
        {
            HTML_FILE: with_evaluation(page, evaluation),
            CARD_FILE: model_card(report, ours, front_matter(directory / CARD_FILE), evaluation),
            REPORT_FILE: json.dumps(data, indent=1) + "\n",
        },
    )
