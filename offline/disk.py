"""What a full or read-only disk does to a run, in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qig_serve.errors import UserError


class ResumableError(UserError):
    """A failure that says nothing against the work done so far: `--resume` goes on from it."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, `path` is written: ResumableError on a full disk, UserError where it may not be."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        raise
    except SafetensorError as error:
        # It reports what the system said in words of its own.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _full(path) from None
        raise


def _full(path: Path) -> ResumableError:
    return ResumableError(
        f"the disk is full ({path}): free some space and run again, with --resume if a block was "
        "finished"
    )
