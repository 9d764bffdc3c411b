"""Tensor-parallel sizes, and the reasons against the others, in what a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_models import one_sample, tiny_model

from qig_serve.cli import main
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe


def test_recorded_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calib = one_sample(tmp_path)
    source = tiny_model("llava", tmp_path / "source")
    options = {"method": "rtn", "calib": calib, "samples": 1}
    quantize(source, tmp_path / "out", make_recipe(options), quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["tensor_parallel_sizes"] == [1, 2]
    assert list(config["summary"]["tensor_parallel_refused"]) == ["4", "8", "16"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "tensor parallel 1, 2; not 4, 8, 16 (256 inputs of o in multiples of 128, " in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Tensor-parallel sizes: 1, 2; not 4, 8, 16 (256 inputs of o" in card
