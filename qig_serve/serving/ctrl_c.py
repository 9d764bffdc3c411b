"""Ctrl-C of `qig-serve serve`: this process alone sees it, and ends those of the engine.

A terminal sends it to all of them. An engine that starts would fail with pages of traceback, and
vLLM's loop would notice only then; one that runs would drop what it is answering.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import Any

import psutil

from qig_serve.serving.engine_watch import THIS_PROCESS

_stopping = threading.Event()
"""Set when a server that is up was asked to stop."""


def take_ctrl_c() -> None:
    """From here on, also of the processes that this one starts. For the main thread, before others.

    Blocked, it reaches a thread that waits for it; where a library that starts a process unblocks
    it in the main thread, it reaches a handler, which is not Python's own, since for that asyncio
    would put in one that waits until the engine has started.
    """
    # The tracker frees what a killed engine shared, and would warn about it: its flags are ours.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    resource_tracker.ensure_running()  # now, because it unblocks the signal when it begins
    signal.signal(signal.SIGINT, _asked)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_wait, daemon=True, name="ctrl-c").start()


def _wait() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        _asked()


def _asked(*_: Any) -> None:
    """Stops a server that is up as SIGTERM does; ends one that starts, or that is asked again."""
    if THIS_PROCESS.report is not None and not _stopping.is_set():
        _stopping.set()
        print("qig-serve serve: finishes what it is answering; Ctrl-C ends it", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return
    # All are stopped before one is ended, which others would notice, and say so; then also those
    # that the others were just starting.
    stopped: set[psutil.Process] = set()
    while started := _children() - stopped:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        stopped |= started
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    print("qig-serve serve: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _children() -> set[psutil.Process]:
    """All that run below this process but the tracker, which cleans up behind them."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker import main" not in " ".join(process.cmdline()):
                found.add(process)
    return found
