"""The folders that a server writes to beside the user's own, looked at before it starts.

In a container with a read-only root, or under a user id without a home, a cache cannot be written,
and vLLM would say so minutes later, in a traceback of one of its processes, or torch while vLLM is
imported. So nothing here imports either.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qig_serve.errors import UserError


@dataclass(frozen=True)
class Folder:
    """One folder that must be writable."""

    purpose: str
    path: str
    variable: str
    """Of the environment; moves the folder."""


def check_folders(cuda: bool) -> None:
    """UserError that names each folder that cannot be written, and the variable that moves it.

    cuda: whether vLLM runs on a GPU; False where vLLM has not been imported yet, which needs some
    of the folders. Creates them, as vLLM would.
    """
    problems = [
        f"{folder.purpose} ({folder.path}): {reason}; set {folder.variable} to a folder that can "
        "be written"
        for folder in _folders(cuda)
        if (reason := why_not_writable(folder.path))
    ]
    if problems:
        raise UserError("; ".join(problems))


def _folders(cuda: bool) -> Iterator[Folder]:
    try:
        yield Folder("temporary files", tempfile.gettempdir(), "TMPDIR")
    except FileNotFoundError:
        yield Folder("temporary files", "/tmp", "TMPDIR")  # noqa: S108 - only named
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "vllm")
    root = os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT", usual))
    yield Folder("vLLM's cache", root, "VLLM_CACHE_ROOT")
    if inductor := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        yield Folder("torch's compiled code", inductor, "TORCHINDUCTOR_CACHE_DIR")
    if not cuda:
        return
    triton = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
    yield Folder("Triton's compiled kernels", triton, "TRITON_CACHE_DIR")
    if importlib.util.find_spec("flashinfer"):
        base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
        path = os.path.join(base, ".cache", "flashinfer")
        yield Folder("FlashInfer's compiled kernels", path, "FLASHINFER_WORKSPACE_BASE")


def why_not_writable(path: str) -> str | None:
    """None if a file can be made in the folder, which is created where it is missing."""
    if path.startswith("~"):  # and would become a folder of that name in the current one
        return "this user has no home folder"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
