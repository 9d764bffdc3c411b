"""The hashes of a checkpoint's files: what was published, and whether it is still that."""

from __future__ import annotations

import hashlib
from pathlib import Path

HASHES_FILE = "qig_manifest.json"
"""File beside config.json: {"format_version": 1, "files": {relative path: sha256 hex}}."""


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
