"""What a checkpoint's files hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found
