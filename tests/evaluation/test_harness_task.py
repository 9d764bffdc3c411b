"""The local task for the harnesses: what is written, what is refused. tests/serving/test_harness.py
runs the harnesses on one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageChops

from qig_serve.errors import UserError
from qig_serve.evaluate import load_samples
from qig_serve.evaluation.harness_task import TASK, main, write_task
from qig_serve.evaluation.statistics import normalize
from qig_serve.samples import Sample, load_image


def test_pictures_rows_and_a_task_a_harness(tmp_path: Path) -> None:
    samples = load_samples("demo", 3)
    write_task(samples, tmp_path / "task", max_tokens=7)
    data = tmp_path / "task" / "data"
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for sample, row in zip(samples, rows, strict=True):
        assert (row["id"], row["question"], row["answer"]) == (
            sample.id,
            sample.question,
            sample.answer,
        )
        with Image.open(data / row["file_name"]) as image:
            assert not ImageChops.difference(image, load_image(sample.images[0])).getbbox()
    for harness, length in (("lm_eval", "max_gen_toks"), ("lmms_eval", "max_new_tokens")):
        task = yaml.safe_load((tmp_path / "task" / harness / f"{TASK}.yaml").read_text())
        assert task["dataset_kwargs"] == {"data_dir": str(data)}
        assert task["generation_kwargs"][length] == 7


@pytest.mark.parametrize(
    "text",
    ["  a red\n  square ", "A\t\tred square", "a redsquare", ""],
    ids=["space", "case-and-tabs", "no-space", "empty"],
)
def test_the_metric_forgives_what_evaluate_forgives(tmp_path: Path, text: str) -> None:
    write_task(load_samples("demo", 1), tmp_path / "task")
    task = yaml.safe_load((tmp_path / "task" / "lm_eval" / f"{TASK}.yaml").read_text())
    metric = task["metric_list"][0]
    stripped = text
    for pattern in metric["regexes_to_ignore"]:  # as the harnesses do it
        stripped = re.sub(pattern, "", stripped)
    same = re.sub(r"\s", " ", stripped).lower() == "a red square"
    assert metric["ignore_case"] and same == (normalize(text) == "a red square")


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (8, 8))
    parts = [{"type": "image", "image": image}, {"type": "image", "image": image}]
    two = Sample("9", "x", ({"role": "user", "content": [*parts, {"type": "text"}]},), "yes")
    with pytest.raises(UserError, match="sample 9: a harness task needs one picture"):
        write_task([two], tmp_path / "task")
    assert not (tmp_path / "task").exists()
    assert main(["demo", str(tmp_path / "task"), "--n", "1"]) == 0
    assert main(["demo", str(tmp_path / "task"), "--n", "1"]) == 2
    assert "holds a task already" in capsys.readouterr().err
