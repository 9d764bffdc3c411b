"""on_a_gpu_checks.py in a process of its own, where torch believes in a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_checks(library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    tests = HERE.parent
    path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "helpers.one_gpu",
         "-p", "no:cacheprovider", *options, str(HERE / "on_a_gpu_checks.py")],
        env={**os.environ, "PYTHONPATH": path, "ONE_GPU": str(library)},
        cwd=tests.parent, capture_output=True, text=True,
    )  # fmt: skip


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_a_compiler
def test_every_method_on_a_gpu(tmp_path: Path) -> None:
    done = run_checks(tmp_path / "one_gpu.so")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_a_compiler
def test_every_family_on_a_gpu(tmp_path: Path) -> None:
    done = run_checks(tmp_path / "one_gpu.so", "-m", "slow")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
