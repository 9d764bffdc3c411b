"""Processes that run at the same time, and all that descends from them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_vllm_plan as plan
import gpu_vllm_run as run

GRACE = 5.0
"""Seconds over its time that a piece may take: then the engine is stopped."""


@dataclass
class Child:
    """A process, its log, and what it writes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    out: Path
    state: str = plan.STARTING
    begun: float = 0.0
    seen: int = 0
    """Version of what it wrote that was merged last."""
    progressed: float = 0.0
    until: float = 0.0
    paused: bool = False

    def result(self) -> dict[str, Any]:
        """What it wrote so far."""
        return run.load(self.out)

    def overdue(self) -> bool:
        """Whether what it measures takes too long."""
        now = time.monotonic()
        return now > self.until + GRACE or now > self.progressed + plan.STALL


def family(root: int) -> list[int]:
    """A process and all that descend from it, also in process groups of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def send_signal(child: Child, number: signal.Signals) -> None:
    """Signal a child and its descendants; of one that ended, its process group."""
    pids = family(child.process.pid) if child.process.poll() is None else []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def begin(
    name: str, command: list[str], log: Path, out: Path, environment: dict[str, str]
) -> Child:
    """Start it, in a process group of its own; all that it prints goes to its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Child(name, process, log, out, begun=time.monotonic())
