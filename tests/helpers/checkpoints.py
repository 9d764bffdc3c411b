"""What a checkpoint's files hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

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
