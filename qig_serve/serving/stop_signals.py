"""Ctrl-C and SIGTERM of `qig-serve serve`: a start ends at once, with the engine's processes.

A terminal sends Ctrl-C to all of them; this process alone sees it. An engine that starts would fail
with pages of traceback, and vLLM's loop would notice only then; one that runs would drop what it is
answering. SIGTERM while the engine loads, vLLM forgets: patches.keep_handler.
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
from qig_serve.vllm_plugin import patches

_stopping = threading.Event()
"""Set when a server that is up was asked to stop."""
_this_process = os.getpid()


def take_stop_signals() -> None:
    """From here on, Ctrl-C also of the processes that this one starts. For the main thread, first.

    Blocked, Ctrl-C reaches a thread that waits for it; where a library that starts a process
    unblocks it in the main thread, it reaches a handler, which is not Python's own, since for that
    asyncio would put in one that waits until the engine has started.
    """
    # The tracker frees what a killed engine shared, and would warn about it: its flags are ours.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    resource_tracker.ensure_running()  # now, because it unblocks the signal when it begins
    signal.signal(signal.SIGINT, _asked)
    # Until the server is up: then its loop puts its own in.
    signal.signal(signal.SIGTERM, _terminated)
    patches.keep_handler(signal.SIGTERM)
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
    _end(signal.SIGINT, "interrupted")


def _terminated(*_: Any) -> None:
    if os.getpid() != _this_process:  # one that was forked has not said yet what SIGTERM does
        os._exit(128 + signal.SIGTERM)
    _end(signal.SIGTERM, "terminated")


def _end(number: int, why: str) -> None:
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
    print(f"qig-serve serve: {why}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _children() -> set[psutil.Process]:
    """All that run below this process but the tracker, which cleans up behind them."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker import main" not in " ".join(process.cmdline()):
                found.add(process)
    return found
