"""What a checkpoint's files hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qig_serve.offline.results import QuantizationReport

CONFIG = {
    "quant_method": "qig",
    "format_version": 1,
    "scheme": "w3a16",
    "bits": 3,
    "group_size": 128,
    "ignore": ["head"],
}
"""What config.json says of a small checkpoint."""


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


Finished = Callable[[str, Any], tuple[Path, QuantizationReport]]
"""(scheme, what a run is made with) -> its checkpoint and report."""


def made_once(
    quantize: Callable[[Path, str, Any], QuantizationReport], folders: pytest.TempPathFactory
) -> Finished:
    """Runs into a folder of their own, each the first time that it is asked for."""

    @cache
    def finished(scheme: str, made_with: Any) -> tuple[Path, QuantizationReport]:
        out = folders.mktemp("finished") / "out"
        return out, quantize(out, scheme, made_with)

    return finished
