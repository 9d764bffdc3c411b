"""Where a run computes, and where its activations wait between blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qig_serve.errors import UserError
from qig_serve.offline.disk import disk_errors
from qig_serve.offline.processes import ALONE, Ranks, local_rank

ACTIVATIONS = "activations"
"""The folder beside the blocks, with one for each process in it."""


@contextmanager
def offload_folder(on_disk: bool, beside: Path | None, ranks: Ranks) -> Iterator[Path | None]:
    """Where activations of this process wait if not in memory (None); gone afterwards.

    beside: the directory of the checkpoint in the making; None in the processes that do not write.
    """
    parent = None
    if beside is not None:
        parent = beside / ACTIVATIONS
        shutil.rmtree(parent, ignore_errors=True)  # a killed run leaves its own
    parent = ranks.broadcast_object(parent)
    if not on_disk or parent is None:
        yield None
        return
    folder = parent / str(ranks.rank)
    with disk_errors(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of a recipe; "auto" is a GPU if there is one. UserError when it is not there.

    Each of several processes of a machine takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"device {name} cannot serve {ranks.size} processes: use --device cuda")
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # which "meta" cannot
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device
