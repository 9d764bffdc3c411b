"""Several processes that share the calibration samples of one run (torchrun).

Every process sends its own samples through the same blocks. What is summed over samples (Hessians,
activation means and maxima, losses, attributions) is summed over processes too, so all of them
take the same decisions; rank 0 alone writes.

Before anything is exchanged the processes agree on whether one of them has failed: a wrong
sample in one ends them all with its sentence, and none waits for another that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qig_serve.errors import UserError
from qig_serve.offline.disk import ResumableError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: rank 0 rounds and writes meanwhile."""


class _PeerFailed(Exception):
    """Mixed into the errors that report another process: they are not reported back."""


class PeerInputError(UserError, _PeerFailed):
    """Another process found something wrong with the input; the sentence is its own."""


class PeerLostError(ResumableError, _PeerFailed):
    """Another process has ended, or failed in a way that says nothing about the input."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; with one of them nothing is ever exchanged."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's share of items that all of them have in the same order."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over processes, in place."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Maximum of each entry over processes, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrites a tensor with that of process 0, in place."""
        if self.size > 1:
            self.barrier()
            dist.broadcast(tensor, src=0)

    def total(self, *values: float) -> list[float]:
        """Each number summed over processes, in fp64."""
        summed = torch.tensor(values, dtype=torch.float64)
        self.sum(summed)
        return summed.tolist()

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value that process `source` has; tensors in it must lie on the host."""
        if self.size == 1:
            return value
        self.barrier()
        held: list[Any] = [value if self.rank == source else None]
        dist.broadcast_object_list(held, src=source)
        return held[0]

    def agree(self, read: dict[str, Any]) -> None:
        """UserError where a process has read anything else than the first one.

        Processes of several machines may each read files of their own.
        """
        first = self.broadcast_object(read)
        other = [key for key in read if read[key] != first[key]]
        if other:
            raise UserError(
                f"process {self.rank} of {self.size} has another {' and '.join(other)} than the "
                "first one: give every machine the same package, model, samples and recipe"
            )

    def barrier(self, error: Exception | None = None) -> None:
        """Waits for all processes. Where one brings an error, all others raise it.

        PeerInputError for a UserError; PeerLostError for any other failure, and when a process
        is gone.
        """
        if self.size == 1:
            return
        try:
            failed = torch.tensor([error is not None], dtype=torch.int32)
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
            if not int(failed):
                return
            failures: list[Any] = [None] * self.size
            dist.all_gather_object(failures, None if error is None else _describe(error))
        except RuntimeError as lost:
            if error is not None:
                return  # its own error is the better one
            reason = str(lost).splitlines()[0]
            raise PeerLostError(
                f"another of the {self.size} processes has ended ({reason}); see what it printed, "
                "and go on with --resume"
            ) from None
        if error is not None:
            return
        rank, (about_input, text) = next((r, t) for r, t in enumerate(failures) if t is not None)
        if about_input:
            raise PeerInputError(text)
        raise PeerLostError(f"process {rank} of {self.size} failed: {text}")

    def leave(self) -> None:
        """Waits until all have cleaned up: torchrun ends the others when the first one exits."""
        if self.size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError:  # a process is gone already: nothing to wait for
            return

    def _reduce(self, tensor: torch.Tensor, op: Any) -> None:
        if self.size > 1:
            self.barrier()
            dist.all_reduce(tensor, op=op)


ALONE = Ranks()
"""One process."""


def _describe(error: Exception) -> tuple[bool, str]:
    """(whether the input is wrong, the sentence)."""
    if isinstance(error, UserError):
        return not isinstance(error, ResumableError), str(error)
    return False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def local_rank() -> int:
    """Which of this machine's processes this is: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or those of a process group that exists already.

    Left by an error, it is reported to the others; left without, it waits until all are done.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ours = size > 1 and not dist.is_initialized()
    if ours:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        try:
            yield ranks
        except _PeerFailed:
            ranks.leave()
            raise
        except Exception as error:
            ranks.barrier(error)
            ranks.leave()
            raise
        ranks.barrier()
    finally:
        if ours:
            dist.destroy_process_group()
