"""A tiny model, and runs of the quantizer on it in processes that may be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.small_llava import SMALL

from qig_serve.demo.model import make_model, make_processor, save_model, train_tokenizer
from qig_serve.demo.questions import samples, write_jsonl
from qig_serve.hashes import file_sha256
from qig_serve.offline import pipeline
from qig_serve.offline.recipe import QuantRecipe

LAYERS = 3
TINY = replace(SMALL, intermediate=128, layers=LAYERS, heads=2, vision_intermediate=64)
# They say how long a run took and what memory it had, which no two runs share.
TIMED = ("report.json", "report.html", "README.md", "qig_manifest.json", "quantize.log")


def make_source(directory: Path) -> Path:
    """The model in `directory`/model, its calibration data in `directory`/calib.jsonl."""
    import torch

    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"{s.question} {s.answer}" for s in samples("train", 24)], 384)
    save_model(make_model(TINY, tokenizer), make_processor(TINY, tokenizer), directory / "model")
    write_jsonl("calibration", 4, directory).rename(directory / "calib.jsonl")
    return directory


def quantize(source: Path, output: Path, resume: bool = False, **fields: Any) -> None:
    """A short run of the whole method."""
    settings = {"samples": 4, "grid": 2, "steps": 2, "device": "cpu"} | fields
    recipe = QuantRecipe(calib=str(source / "calib.jsonl"), **settings)
    pipeline.quantize(source / "model", output, recipe, resume=resume, quiet=True)


def partial_of(output: Path) -> Path:
    """Where an unfinished run lies."""
    return output.parent / f".{output.name}.partial"


def files_of(directory: Path) -> dict[str, Path]:
    """Every file by its relative path, but hidden ones, which no reader looks at."""
    found = {p.relative_to(directory): p for p in sorted(directory.rglob("*")) if p.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file that must be the same in any two runs, by its relative path."""
    return {n: file_sha256(p) for n, p in files_of(directory).items() if p.name not in TIMED}


def vouched(directory: Path) -> bool:
    """Whether the manifest lists every file of a published directory with its hash."""
    listed = json.loads((directory / "qig_manifest.json").read_text())["files"]
    found = {n: file_sha256(p) for n, p in files_of(directory).items() if n != "qig_manifest.json"}
    return bool(listed == found)


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Runs `work` in a child process; its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """What kill -9 does, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(folder: Path, number: int) -> Callable[[], int]:
    """Kills this process before its `number`-th operation that changes something in `folder`.

    The operations are those that Python audits: opening for writing, renaming, removing, making
    directories, copying. Returns how many there were so far. Cannot be undone: for children only.
    """
    seen = 0
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            changing = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            changing = event in changes
        if changing and any(str(folder) in str(a) for a in args[:2]):
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(hook)
    return lambda: seen
