"""Runs of the offline stage in two processes that share the samples."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qig_serve.errors import UserError
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe


def run_cases(
    rank: int,
    meeting: Path,
    model: Path,
    out: Path,
    cases: dict[str, Any],
    resume: bool = False,
) -> None:
    """One of two: case after case. What fails leaves its sentence in OUT/NAME.RANK.txt."""
    dist.init_process_group(
        "gloo", f"file://{meeting}", timedelta(minutes=10), world_size=2, rank=rank
    )
    for name, recipe in cases.items():
        try:
            quantize(model, out / name, QuantRecipe(**recipe), resume=resume, quiet=True)
        except UserError as error:
            (out / f"{name}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def in_two_processes(model: Path, out: Path, cases: dict[str, Any], resume: bool = False) -> None:
    context = multiprocessing.get_context("fork")  # torch is imported already
    meeting = out.parent / f"{out.name}-{time.monotonic_ns()}"
    processes = [
        context.Process(target=run_cases, args=(rank, meeting, model, out, cases, resume))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    assert [p.exitcode for p in processes] == [0, 0]
