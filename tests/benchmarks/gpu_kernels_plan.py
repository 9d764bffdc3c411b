"""What `make gpu` does in which order and for how long, and the file its results are in.

Standard library alone, so that the plan prints on any machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SECONDS = 360.0
PACKAGES = ("torch", "triton", "vllm", "humming-kernels", "gemlite")


@dataclass(frozen=True)
class Stage:
    """A part of the run, in a process of its own."""

    name: str
    usual: float
    """Seconds that it is expected to take: with fewer left it is not begun."""
    limit: float
    """Seconds after which it is stopped."""
    what: str


STAGES = (
    Stage("warm", 35, 60, "compile every kernel that is timed, by a process a core"),
    Stage("tests", 45, 80, "the gpu tests, fourteen processes"),
    Stage("tune", 50, 70, "time the candidates; tiles.json"),
    Stage("time", 15, 30, "sums of a layer's linears, quantizers, the output head"),
    Stage("rivals", 40, 75, "Humming, GemLite, Marlin, Machete, CUTLASS beside ours"),
    Stage("counters", 35, 45, "twelve launches under Nsight Compute: what limits them"),
)


def chosen(names: Iterable[str]) -> list[Stage]:
    """The stages of these names, in their order; ValueError for a name that is none."""
    wanted = [name for name in names if name]
    if unknown := set(wanted) - {stage.name for stage in STAGES}:
        raise ValueError(f"no such stage: {', '.join(sorted(unknown))}")
    return [stage for stage in STAGES if stage.name in wanted]


def describe(stages: list[Stage], seconds: float) -> str:
    """The plan as a table: when each stage begins at the latest, if all take what they may."""
    lines, begin = [f"{'stage':<10}{'usually':>9}{'at most':>9}{'begins by':>11}"], 0.0
    for stage in stages:
        fits = begin + stage.usual <= seconds
        at = f"{begin:.0f} s" if fits else "if quick"
        lines.append(
            f"{stage.name:<10}{stage.usual:>7.0f} s{min(stage.limit, seconds):>7.0f} s{at:>11}"
            f"  {stage.what}"
        )
        begin += min(stage.limit, max(0.0, seconds - begin)) if fits else 0
    return "\n".join([*lines, f"ends after {seconds:.0f} s"])


@dataclass(frozen=True)
class Outcome:
    """How a stage went."""

    status: str
    """done, failed, stopped (its time was up), or not begun."""
    seconds: float
    reason: str = ""


class Results:
    """A JSON file of sections, whole at any moment: written beside, then renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Every section; none before the first is written."""
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def write(self, section: str, value: Any) -> None:
        """Replace a section."""
        write_json(self.path, {**self.read(), section: value})


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


@dataclass(frozen=True)
class Context:
    """What a stage is given."""

    results: Results
    until: float
    """time.monotonic() at which it has to have ended."""
    out: Path
    """Folder for files of its own."""
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        """Seconds until then."""
        return self.until - self.clock()


class Failed(Exception):
    """A stage's reason, in a sentence, that it has no result."""


def run_stages(
    stages: Iterable[Stage],
    seconds: float,
    run: Callable[[str, float], Outcome],
    note: Callable[[str, Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """One stage after the other within `seconds`; each outcome is noted at once.

    run(name, limit) -> how it went. A stage's failure is its own, and the next one follows.
    """
    begun, outcomes = clock(), {}
    for stage in stages:
        left = seconds - (clock() - begun)
        if left < stage.usual:
            reason = f"{max(0.0, left):.0f} s were left, and it usually takes {stage.usual:.0f} s"
            outcome = Outcome("not begun", 0.0, reason)
        else:
            outcome = run(stage.name, min(stage.limit, left))
        outcomes[stage.name] = outcome
        note(stage.name, outcome)
    return outcomes


def machine(measured: str | None = None) -> dict[str, Any]:
    """Card, versions and commit (`measured`, if given); RuntimeError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("the kernels are measured on a GPU, and no CUDA device was found")
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": torch.cuda.get_device_name(),
        "capability": major * 10 + minor,
        "sms": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": measured or commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def versions() -> dict[str, str | None]:
    """Of what is compared; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit measured, "+" if the kernels differ from it; None outside a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "kernels"], cwd=ROOT)
    return head + ("+" if changed.returncode else "") if head else None


def slug(card: str) -> str:
    """A card in a file's name: "NVIDIA H200" -> "H200"."""
    return re.sub(r"[^A-Za-z0-9]+", "-", card.removeprefix("NVIDIA ")).strip("-")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome in the results, without an empty reason."""
    return {k: v for k, v in asdict(outcome).items() if v != ""}
