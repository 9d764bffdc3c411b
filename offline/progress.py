"""Progress of a run: a live bar on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import resource
import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def host_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_bytes(device: torch.device) -> int:
    """Peak memory allocated on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class RunProgress:
    """Blocks are the units; a step names what is being done inside one."""

    def __init__(self, blocks: int, device: torch.device, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._device = device
        self._blocks = blocks
        self._block = 0
        self._start = time.monotonic()
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}/{task.total} blocks"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("start", total=blocks, memory="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def block(self, index: int) -> None:
        """Block `index` begins (blocks below it are done)."""
        self._block = index
        self._bar.update(self._task, completed=index)

    def step(self, text: str, done: float) -> None:
        """What is being done in the block, and which fraction of the block is done."""
        self._bar.update(
            self._task,
            description=f"block {self._block}: {text}",
            completed=self._block + done,
            memory=self.memory(),
        )

    def block_done(self, text: str, first: int) -> None:
        """Block finished: a line with time, time left and memory. `first` is the first block of
        this run (later than 0 if resumed)."""
        self._bar.update(self._task, completed=self._block + 1)
        spent = time.monotonic() - self._start
        left = spent / (self._block + 1 - first) * (self._blocks - self._block - 1)
        self.line(
            f"block {self._block + 1}/{self._blocks}  {text}  {spent:.0f} s, {left:.0f} s left, "
            f"{self.memory()}"
        )

    def memory(self) -> str:
        """Peak memory so far, for people."""
        text = f"{host_bytes() / 2**30:.1f} GiB host"
        if device := device_bytes(self._device):
            text += f", {device / 2**30:.1f} GiB device"
        return text
