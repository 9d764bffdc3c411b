"""Figures and settings that commands write as JSON, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError

STANDARD_OUTPUT = Path("-")
_for_standard_output: list[str] = []


@contextlib.contextmanager
def standard_output(only_json: bool) -> Iterator[None]:
    """Prints at its end the last JSON written to STANDARD_OUTPUT; if `only_json`, nothing else."""
    try:
        with contextlib.ExitStack() as stack:
            if only_json:
                nowhere = stack.enter_context(open(os.devnull, "w", errors="surrogateescape"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        while _for_standard_output:
            print(_for_standard_output.pop(), end="")


def write_json(path: Path, record: Any) -> None:
    """JSON through `write_whole`; for STANDARD_OUTPUT it is kept until the command has ended."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        _for_standard_output[:] = [text]
    else:
        write_whole(path, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """A file beside the target, then renamed onto it, so that no half file is left.

    Into what is no file of its own, such as /dev/stdout, a pipe or a link, it is written at once.
    UserError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
        else:
            partial.write_bytes(data)
            partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
