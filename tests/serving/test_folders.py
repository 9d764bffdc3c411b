"""A folder that cannot be written is named before the server starts, with what moves it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qig_serve.errors import UserError
from qig_serve.serving import folders
from qig_serve.serving.folders import check_folders


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and caches of the test's own."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    return tmp_path


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_folders_are_made(elsewhere: Path, cuda: bool) -> None:
    check_folders(cuda)
    assert (elsewhere / "vllm").is_dir()
    assert (elsewhere / "home" / ".triton" / "cache").is_dir() is cuda


@pytest.mark.parametrize(
    ("variable", "purpose", "cuda"),
    [
        ("VLLM_CACHE_ROOT", "vLLM's cache", False),
        ("TORCHINDUCTOR_CACHE_DIR", "torch's compiled code", False),
        ("TRITON_CACHE_DIR", "Triton's compiled kernels", True),
    ],
)
def test_a_folder_that_cannot_be_written(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, variable: str, purpose: str, cuda: bool
) -> None:
    (elsewhere / "file").write_text("")
    path = elsewhere / "file" / "cache"  # below a file: not even root can make it
    monkeypatch.setenv(variable, str(path))
    message = rf"{purpose} \({path}\): cannot be written \(Not a directory\); set {variable} to a"
    with pytest.raises(UserError, match=message):
        check_folders(cuda)


def test_a_user_without_a_home(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """expanduser leaves the tilde, and a folder of that name would be made where one stands."""
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"vLLM's cache \(~/.cache/vllm\): this user has no home"):
        check_folders(cuda=False)
    assert not (elsewhere / "~").exists()


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    monkeypatch.setattr(folders, "why_not_writable", lambda path: "no" if path == "/tmp" else None)
    with pytest.raises(UserError, match=r"temporary files \(/tmp\): no; set TMPDIR"):
        check_folders(cuda=False)
