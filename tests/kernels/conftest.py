"""The oldest Triton that the kernels support, beside the one that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "3.6.0"
FOLDER = Path(__file__).parents[2] / "build" / f"triton-{OLDEST}"


@pytest.fixture(scope="session")
def oldest_triton() -> Path:
    """A folder for PYTHONPATH, filled by pip at the first use."""
    if not (FOLDER / "triton").is_dir():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
             "--target", str(FOLDER), f"triton=={OLDEST}"],
            check=True,
        )  # fmt: skip
    return FOLDER
