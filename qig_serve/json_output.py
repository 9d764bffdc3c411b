"""Figures and settings that commands write as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError


def write_json(path: Path, record: Any) -> None:
    """JSON beside the target, then renamed onto it, so that no half file is left.

    Into what is no file of its own, such as /dev/stdout, a pipe or a link, it is written at once.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")
        else:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
