"""Tiny LLaVAs, and a few samples to calibrate them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one with a GQA decoder."""
    from helpers.small_llava import small_llava

    return small_llava(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def seven_samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL of seven questions with pictures."""
    from qig_serve.demo.questions import write_jsonl

    return str(write_jsonl("calibration", 7, tmp_path_factory.mktemp("calib")))


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the one that stands for its family."""
    from helpers.tiny_models import tiny_model

    return tiny_model("llava", tmp_path_factory.mktemp("intact") / "llava")


@pytest.fixture
def model(intact: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(intact, tmp_path / "llava"))


@pytest.fixture
def end_at_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets Ctrl-C end a run that begins to round its n-th block, until `monkeypatch.undo`."""
    from qig_serve.offline import pipeline

    def end(last: int) -> None:
        original, calls = pipeline.round_block, []

        def killed(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(pipeline, "round_block", killed)

    return end
