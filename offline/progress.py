"""Progress of a run: a live bar on a terminal, plain lines elsewhere, nothing if quiet.

A log file gets the plain lines in every case, with the time and the steps inside a block.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qig_serve.offline.disk import ResumableError


def host_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_bytes(device: torch.device) -> int:
    """Peak memory allocated on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def gibibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def waiting(text: str, quiet: bool) -> Iterator[None]:
    """Says on a terminal what is being done, for as long as it is; elsewhere nothing."""
    with Console(stderr=True, quiet=quiet).status(text):
        yield


class RunProgress:
    """Blocks are the units; a step names what is being done inside one.

    Lines are appended to the file `log`, if one is given, until `close_log`.
    """

    def __init__(
        self, blocks: int, device: torch.device, quiet: bool = False, log: Path | None = None
    ) -> None:
        self._log = None if log is None else log.open("a", encoding="utf-8", buffering=1)
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._device = device
        self._blocks = blocks
        self._block = 0
        self._start = time.monotonic()
        self._begun = False
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
            console=self._console,
            disable=not self._live,
        )
        # What follows the blocks, tuning and writing, is one unit more: the clock goes on.
        self._task = self._bar.add_task("dry run", total=blocks + 1)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._bar.update(self._task, completed=self._blocks + 1)
        self._bar.stop()
        if error is not None:
            self._write(f"stopped: {str(error) or type(error).__name__}")
        self.close_log()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)
        self._write(text)

    def close_log(self) -> None:
        """The log is complete: what follows goes to the terminal only."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
        except OSError as error:
            name, self._log = self._log.name, None
            raise ResumableError(f"{name} cannot be written: {error.strerror}") from None

    def block(self, index: int) -> None:
        """Block `index` begins (blocks below it are done). The first to begin starts the clock."""
        if not self._begun:
            self._start, self._begun = time.monotonic(), True
        self._block = index
        self._bar.update(self._task, completed=index)

    def step(self, text: str, done: float) -> None:
        """What is being done in the block, and which fraction of the block is done."""
        self._write(f"block {self._block + 1}/{self._blocks}: {text}")
        self._bar.update(
            self._task,
            description=f"block {self._block + 1}/{self._blocks}: {text}",
            completed=self._block + done,
        )

    def beside_blocks(self, text: str) -> None:
        """What is being done before the first block or behind the last."""
        self._write(text)
        self._bar.update(self._task, description=text)

    def tuning(self, done: int, steps: int) -> None:
        """Of the tuning of all scales `done` steps are behind us."""
        self.beside_blocks(f"tuning scales: step {done}/{steps}")

    def block_done(self, text: str, first: int) -> None:
        """Block finished: a line with time, time left and memory. `first` is the first block of
        this run (later than 0 if resumed)."""
        self._bar.update(self._task, completed=self._block + 1)
        spent = time.monotonic() - self._start
        left = spent / (self._block + 1 - first) * (self._blocks - self._block - 1)
        self.line(
            f"block {self._block + 1}/{self._blocks}  {text}  {duration(spent)}, "
            f"{duration(left)} left, {self.memory()}"
        )

    def memory(self) -> str:
        """Peak memory so far, for people."""
        text = f"{gibibytes(host_bytes())} host"
        if device := device_bytes(self._device):
            text += f", {gibibytes(device)} device"
        return text
