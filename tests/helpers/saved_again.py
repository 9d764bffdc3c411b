"""Models that the installed transformers has saved: tensor names differ from published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _loaded(source: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)


def _again(source: Path, target: Path) -> None:
    _loaded(source).save_pretrained(target)


def _built(source: Path, target: Path) -> None:
    # As a training run that begins with a configuration, or with parts of other models.
    from transformers import AutoModelForImageTextToText

    model = _loaded(source)
    fresh = AutoModelForImageTextToText.from_config(model.config).to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(target)


def _own_names(source: Path, target: Path) -> None:
    _loaded(source).save_pretrained(target, save_original_format=False)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "again": _again,  # loaded and saved: the names that were loaded
    "built": _built,  # never loaded: LLaVA, OneVision and Gemma 3 lack a level of the tower
    "own-names": _own_names,  # those of the modules
}


def save_again(published: Path, directory: Path, way: str) -> Path:
    """A model directory saved in one of WAYS; the new directory."""
    from transformers import AutoProcessor

    WAYS[way](published, directory)
    AutoProcessor.from_pretrained(published).save_pretrained(directory)
    return directory
