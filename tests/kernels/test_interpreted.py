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


CHECKS = ["kernel_checks.py", "quantizer_checks.py", "vocabulary_checks.py", "expert_checks.py"]


def run_checks(checks: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider",
         str(FOLDER / checks)],  # two: this file is what other processes wait for
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        cwd=FOLDER.parent.parent, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_under_the_interpreter(checks: str) -> None:
    done = run_checks(checks)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_under_the_oldest_triton(checks: str, oldest_triton: Path) -> None:
    done = run_checks(checks, PYTHONPATH=str(oldest_triton))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
