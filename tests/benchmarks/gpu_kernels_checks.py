"""Stage tests: the gpu tests in ten processes, counted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_kernels_plan import ROOT, Context, Failed

PROCESSES = 14
TESTS = "tests/kernels/test_gpu.py"


def command(report: Path) -> list[str]:
    """pytest's."""
    parallel = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    return [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", *parallel,
        "-p", "no:cacheprovider", f"--junitxml={report}", TESTS,
    ]  # fmt: skip


def counts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the first line of each failure."""
    passed, skipped, failures = 0, 0, {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error")]
        if bad:
            message = (bad[0].get("message") or "").splitlines() or [""]
            failures[str(case.get("name"))] = message[0][:200]
        elif any(part.tag == "skipped" for part in case):
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def run(context: Context) -> None:
    """A failure is named, and the other stages go on: times of wrong kernels are marked by it."""
    report = context.out / ".gpu-tests.xml"
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(
            command(report), cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=max(1.0, context.left() - 2),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Failed("the gpu tests did not end in time") from error
    if not report.exists():
        last = (done.stdout + done.stderr).strip().splitlines() or ["nothing was printed"]
        raise Failed(f"pytest ended with status {done.returncode}: {last[-1][:200]}")
    found = counts(report)
    report.unlink()
    context.results.write("tests", found)
    print(f"{found['passed']} passed, {found['failed']} failed", flush=True)
    if found["failed"] or not found["passed"]:
        print("\n".join(f"  {n}: {m}" for n, m in found["failures"].items()), flush=True)
        raise Failed(f"{found['failed']} of the gpu tests failed, {found['passed']} passed")
