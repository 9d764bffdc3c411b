"""The files that commands write beside checkpoints: figures and settings as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError


def check_folder(*paths: Path | None) -> None:
    """UserError for a file to be written in a folder that is not there; before the work begins."""
    for path in paths:
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"the folder of {path} does not exist")


def write_json(path: Path, record: Any) -> None:
    """JSON beside the target, then renamed onto it, so that no half file is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
