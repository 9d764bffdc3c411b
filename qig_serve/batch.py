"""Offline batches: every request of a file through vLLM, at vLLM's own throughput.

The requests go to the routes of vLLM's own server application, in this process and without a
socket, so a batch understands what the server understands; chat completions that go well skip even
the routes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qig_serve.errors import UserError
from qig_serve.model_directory import find_model, read_manifest
from qig_serve.serving import batch_io, in_process
from qig_serve.serving.batch_io import Request
from qig_serve.serving.batch_results import Results
from qig_serve.serving.limits import Limits

_WAITING = 2
"""Requests in hand for each that the engine can run: the next are ready when one ends."""

_LOWEST_PRIORITY = 19

_ERRORS_TOLD = 10

_SECONDS_A_LINE = 60.0
"""Off a terminal progress is said this often."""


@dataclass
class Totals:
    """What a batch came to."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """From the first request to the last row; the model was loaded before. 0 without an engine."""
    first_errors: list[str] = field(default_factory=list)
    """What the first rows that failed say, ten at most."""


class EngineDied(RuntimeError):
    """vLLM's engine is gone; rows written so far are good."""


def generate(
    model: Path | str,
    source: Path,
    output: Path,
    *,
    prompt: str | None = None,
    max_tokens: int | None = None,
    resume: bool = False,
    flags: Sequence[str] = (),
    quiet: bool = False,
    give_way: bool = False,
) -> Totals:
    """Answer every request of `source` into `output`, rows in the order in which they finish.

    model: the checkpoint's directory, or its org/name where the hub's local cache has it;
    flags: of `vllm serve`; quiet: no progress bar; give_way: the engine's processes go first, and
    the calling thread keeps its lowest priority afterwards. The engine is started only if a
    request can be sent to it. UserError for input that is wrong as a whole; EngineDied if the
    engine died, after which `resume` continues.
    """
    from qig_serve.inspection import require_sound
    from qig_serve.serve import checked_values, parse_flags, set_environment
    from qig_serve.serving.adapter_tensors import check_adapter_tensors
    from qig_serve.serving.adapters import check_adapters

    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}: an answer has at least one token")
    directory = find_model(model)
    manifest = read_manifest(directory)
    require_sound(directory)
    defaults: dict[str, Any] = {"max_tokens": max_tokens} if max_tokens else {}
    first = next(batch_io.read_requests(source, prompt, defaults), None)
    if first is None:
        raise UserError(f"{source}: no requests in it")
    set_environment(Limits())
    args = parse_flags(directory, flags)
    check_adapters(directory, manifest, args)
    check_adapter_tensors(directory, args)
    args.disable_log_stats = True  # the progress bar shows it, at no cost per token
    defaults["model"] = (args.served_model_name or [args.model])[0]
    results = Results(output, resume)
    folder = source if source.is_dir() else source.parent
    try:
        requests = batch_io.read_requests(source, prompt, defaults)
        if not any(_sendable(request, folder, results) for request in requests):
            runner = Runner(None, None, folder, results, lambda _: None)
            asyncio.run(runner.run(batch_io.read_requests(source, prompt, defaults), 1))
            return runner.totals
        with checked_values(args):
            requests = batch_io.read_requests(source, prompt, defaults)
            return asyncio.run(_run(args, requests, source, folder, results, quiet, give_way))
    finally:
        results.close()


def _sendable(request: Request, folder: Path, results: Results) -> bool:
    """Whether the engine is needed for a request: it has no row yet, and can be sent."""
    if results.has(request):
        return False
    try:
        batch_io.body_to_send(request, folder)
    except ValueError:
        return False
    return True


async def _run(
    args: Any,
    requests: Iterator[Request],
    source: Path,
    folder: Path,
    results: Results,
    quiet: bool,
    give_way: bool,
) -> Totals:
    from qig_serve.serving import media  # noqa: F401  registers the media connector
    from qig_serve.vllm_plugin import compat, patches

    async with compat.engine_client()(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = compat.app_builder()(args, tasks, engine.model_config)
        await compat.app_state_initializer()(engine, app.state, args, tasks)
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM stops it if the engine dies
        patches.drop_middlewares(app)
        patches.remember_only_sent_pictures(engine)
        patches.blame_dead_grammars(engine)
        at_once = _WAITING * engine.vllm_config.scheduler_config.max_num_seqs
        with _Progress(batch_io.count_requests(source), quiet) as progress:
            handler = getattr(app.state, "openai_serving_chat", None)  # of models that generate
            chat = in_process.chat_of(handler) if handler else None
            runner = Runner(app, engine, folder, results, progress, chat)
            if give_way:  # with few cores the engine's steps would wait for this thread
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
            gc.collect()
            gc.freeze()  # walking all that vLLM loaded took a third of this process's time
            began = time.perf_counter()
            try:
                await runner.run(requests, at_once)
            finally:
                gc.unfreeze()
            runner.totals.seconds = time.perf_counter() - began
    return runner.totals


@dataclass
class Runner:
    """Sends requests as fast as they are taken, and writes rows as they come."""

    app: Any
    engine: Any
    folder: Path
    results: Results
    progress: Any
    chat: in_process.Chat | None = None
    totals: Totals = field(default_factory=Totals)

    async def run(self, requests: Iterator[Request], at_once: int) -> None:
        """Answer them all; the first failure that is not a request's own ends the batch."""
        workers = [asyncio.create_task(self._work(requests)) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()

    async def _work(self, requests: Iterator[Request]) -> None:
        for request in requests:  # shared: each takes the next
            if self.results.has(request):
                self.totals.skipped += 1
                self.progress(self.totals)
                continue
            row = await self._answer(request)
            self.results.write(row)
            self.totals.done += 1
            if row["error"] is not None:
                self.totals.failed += 1
                if len(self.totals.first_errors) < _ERRORS_TOLD:
                    self.totals.first_errors.append(row["error"]["message"])
            self.totals.tokens += batch_io.completion_tokens(row)
            self.progress(self.totals)

    async def _answer(self, request: Request) -> dict[str, Any]:
        names: dict[str, str] = {}
        try:
            body = batch_io.body_to_send(request, self.folder, names)
        except ValueError as error:
            return batch_io.error_row(request, str(error))
        request_id = uuid.uuid4().hex
        if self.chat is not None and request.url == batch_io.URL:
            whole = await self.chat(body, request_id)
            if whole is not None:
                return batch_io.result_row(request, 200, request_id, whole)
        sent = json.dumps(body).encode()
        status, raw = await in_process.post(self.app, request.url, sent, request_id)
        if self.engine.errored:  # not this request's fault: leave it to --resume
            raise EngineDied(f"the engine died at line {request.line}")
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = raw.decode(errors="replace")
        picture = self._unreadable(names) if status == 400 and not request.picture else ""
        return batch_io.result_row(request, status, request_id, answer, picture)

    def _unreadable(self, names: dict[str, str]) -> str:
        """The first file that vLLM makes no picture of; its own sentence does not name it."""
        from qig_serve.serving.media import GuardedMediaConnector

        for url, name in names.items():
            try:
                GuardedMediaConnector().fetch_image(url)
            except Exception:  # of whatever kind: the answer says why
                return name
        return ""


class _Progress:
    """Requests and tokens per second on stderr; called with the totals.

    A bar on a terminal, elsewhere a line a minute.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._total, self._next = total, _SECONDS_A_LINE
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, rates="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, totals: Totals) -> None:
        elapsed = self._bar.tasks[0].elapsed or 0
        rates = ""
        if elapsed > 0:
            rates = f"{totals.done / elapsed:.1f} req/s, {totals.tokens / elapsed:.0f} tok/s"
            rates += f", {totals.failed} failed" if totals.failed else ""
        answered = totals.done + totals.skipped
        self._bar.update(self._task, completed=answered, rates=rates)
        if self._lines and elapsed >= self._next:
            self._next = elapsed + _SECONDS_A_LINE
            print(f"{answered}/{self._total} requests, {rates}", file=sys.stderr, flush=True)
