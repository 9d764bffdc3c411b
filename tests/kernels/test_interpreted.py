"""kernel_checks.py and the other checks under TRITON_INTERPRET=1, in processes of their own.

Triton reads the variable when it is imported, and other tests import Triton without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run_checks(**environment: str) -> subprocess.CompletedProcess[str]:
    checks = [str(path) for path in sorted(FOLDER.glob("*_checks.py"))]
    assert len(checks) == 6
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider",
         *checks],  # two: this file is what other processes wait for
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        cwd=FOLDER.parent.parent, capture_output=True, text=True,
    )  # fmt: skip


def test_kernels_under_the_interpreter() -> None:
    done = run_checks()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_kernels_under_the_oldest_triton(oldest_triton: Path) -> None:
    done = run_checks(PYTHONPATH=str(oldest_triton))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
