"""Kernels made ready before the first request: compiled by threads while vLLM reads the weights.

A linear is announced when vLLM creates it (`begin`), and what its kernels need is compiled in the
background: each variant once, whatever the number of layers. Triton lets go of Python's lock while
LLVM and ptxas work, so threads compile side by side, and its cache on disk is used as ever. When
the weights are there, `finish` waits for what is left and says in the log how long it all took.
Nothing is compiled afterwards: the number of tokens is no part of what a kernel is compiled for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

_MOST_THREADS = 16
_logger = logging.getLogger("vllm.qig_serve.kernels")  # under vLLM's, whose handlers it has


class Compilation:
    """Jobs by name, each done once; for one process."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: dict[Hashable, Future[None]] = {}
        self._lock = threading.Lock()
        self._started = 0.0
        self._said = 0

    def begin(self, name: Hashable, job: Callable[[], None]) -> None:
        """Run the job in the background, unless one of that name was begun before."""
        with self._lock:
            if name in self._jobs:
                return
            if self._executor is None:
                self._started = time.monotonic()
                self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="qig-compile")
            self._jobs[name] = self._executor.submit(job)

    def finish(self) -> None:
        """Wait for every job; what one of them raised is raised here."""
        with self._lock:
            executor, self._executor = self._executor, None
            jobs = list(self._jobs.values())
        if executor is not None:
            executor.shutdown()  # after the jobs that were begun
        for job in jobs:
            job.result()
        if len(jobs) > self._said:
            self._said = len(jobs)
            took = time.monotonic() - self._started
            _logger.info(
                "%d kernels ready, %.1f s after the first was wanted (%d threads)",
                len(jobs), took, self.threads,
            )  # fmt: skip


COMPILATION = Compilation()
