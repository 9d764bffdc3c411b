"""A tiny LLaVA with a GQA decoder, and a few samples to calibrate it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory."""
    from helpers.small_llava import small_llava

    return small_llava(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def seven_samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL of seven questions with pictures."""
    from qig_serve.demo.questions import write_jsonl

    return str(write_jsonl("calibration", 7, tmp_path_factory.mktemp("calib")))
