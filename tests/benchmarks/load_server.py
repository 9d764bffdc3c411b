"""Many clients at once on `qig-serve serve`: errors, memory, and whether the answers stay right.

    python tests/benchmarks/load_server.py [DIR] [--clients 200 --seconds 120]

DIR is a checkpoint of the demonstration model; without it the bundled one is quantized by rounding
to `--scheme`. Every question is first asked of the quiet server, alone, with the log-probabilities
of the two best tokens. Then each client asks one question after the other, half of them streaming.
An answer that differs from the quiet one counts as a near tie if the best two tokens were within
`NEAR_TIE` nats where it turns off, and as wrong otherwise. Memory is the proportional set size of
the server's processes, sampled every two seconds.

Exit status 1 if a request failed with anything but 503, memory grew by 5% or more after the
warm-up, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

QUESTIONS = 64
TOKENS = 64
NEAR_TIE = 0.05
GROWTH_LIMIT = 0.05
START_SECONDS = 300
FLAGS = ["--enforce-eager", "--max-model-len", "512", "--served-model-name", "demo"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']


@dataclass(frozen=True)
class Quiet:
    """What the quiet server answers."""

    text: str
    gaps: list[tuple[int, float]]
    """For each token: where its text ends in the answer, and best minus second, in nats."""


@dataclass
class Outcome:
    """What came of the load."""

    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    near_ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and bytes."""

    def growth(self, warm_up: float) -> tuple[float, float, float]:
        """MiB after the warm-up, MiB at the end, and their ratio less one.

        Each is the median of a tenth of the samples, so that no single moment decides.
        """
        rest = [size / (1 << 20) for at, size in self.memory if at >= warm_up]
        part = max(1, len(rest) // 10)
        first, last = statistics.median(rest[:part]), statistics.median(rest[-part:])
        return first, last, last / first - 1


def questions() -> list[dict[str, Any]]:
    """Requests about held-out pictures, every type of question among them."""
    from qig_serve.demo.questions import make_sample
    from qig_serve.samples import data_url

    requests = []
    for index in range(QUESTIONS):
        sample = make_sample("test", index)
        content = [
            {"type": "image_url", "image_url": {"url": data_url(sample.image)}},
            {"type": "text", "text": sample.question},
        ]
        messages = [{"role": "user", "content": content}]
        requests.append(
            {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        )
    return requests


@contextlib.contextmanager
def running(directory: Path, log: Path, flags: list[str]) -> Iterator[tuple[str, int]]:
    """A server's URL and process id; stopped on the way out."""
    import signal
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "qig_serve", "serve", str(directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | os.environ,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def memory(pid: int) -> int:
    """Bytes that a process and its descendants occupy; shared pages are counted once."""
    total = 0
    waiting = [pid]
    while waiting:
        process = Path("/proc") / str(waiting.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return total


async def ask_quietly(http: aiohttp.ClientSession, request: dict[str, Any]) -> Quiet:
    """One question on its own."""
    body = request | {"logprobs": True, "top_logprobs": 2}
    async with http.post("/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        choice = (await answer.json())["choices"][0]
    gaps, length = [], 0
    for step in choice["logprobs"]["content"]:
        length += len(step["token"])
        best, second = sorted((t["logprob"] for t in step["top_logprobs"]), reverse=True)[:2]
        gaps.append((length, best - second))
    return Quiet(choice["message"]["content"] or "", gaps)


async def ask(http: aiohttp.ClientSession, body: dict[str, Any], stream: bool) -> tuple[int, str]:
    """Status and text of an answer."""
    more = {"stream": True} if stream else {}
    async with http.post("/v1/chat/completions", json=body | more) as answer:
        if answer.status != 200:
            return answer.status, await answer.text()
        if not stream:
            return 200, (await answer.json())["choices"][0]["message"]["content"] or ""
        text, done = "", False
        async for line in answer.content:
            event = line.decode().removeprefix("data: ").strip()
            done = done or event == "[DONE]"
            if event and not done:
                text += json.loads(event)["choices"][0]["delta"].get("content") or ""
        if not done:
            raise aiohttp.ClientPayloadError("the stream ended before [DONE]")
        return 200, text


def judge(outcome: Outcome, quiet: Quiet, text: str) -> None:
    """Compare an answer with the quiet one."""
    if text == quiet.text:
        return
    pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(text, quiet.text, strict=False)
    )
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    gap = next((gap for end, gap in quiet.gaps if end > common), quiet.gaps[-1][1])
    shown = f"{quiet.text!r} became {text!r} ({gap:.3f} nats at character {common})"
    (outcome.near_ties if gap <= NEAR_TIE else outcome.wrong).append(shown)


async def load(url: str, pid: int, clients: int, seconds: float) -> Outcome:
    """Ask quietly, then all at once."""
    outcome = Outcome()
    requests = questions()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        quiet = [await ask_quietly(http, request) for request in requests]
        for request, before in zip(requests, quiet, strict=True):
            if await ask(http, request, stream=False) != (200, before.text):
                raise SystemExit("the quiet server gives one question two answers")
        began = time.monotonic()

        async def client(number: int) -> None:
            turn = number
            while time.monotonic() - began < seconds:
                asked, which = time.monotonic(), turn * 7 % len(requests)
                turn += 1
                try:
                    status, text = await ask(http, requests[which], stream=number % 2 == 1)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    outcome.errors[f"{type(error).__name__}: {error}"] += 1
                    continue
                outcome.statuses[status] += 1
                if status == 200:
                    outcome.seconds.append(time.monotonic() - asked)
                    judge(outcome, quiet[which], text)
                elif status == 503:
                    await asyncio.sleep(1)
                else:
                    outcome.errors[f"{status}: {text[:200]}"] += 1

        async def watch() -> None:
            while True:
                used = await asyncio.to_thread(memory, pid)
                outcome.memory.append((time.monotonic() - began, used))
                await asyncio.sleep(2)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client(number) for number in range(clients)))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return outcome


def bundled(scheme: str, folder: Path) -> Path:
    """The demonstration model, quantized by rounding."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from helpers import tiny_llava

    from qig_serve.demo import MODEL_DIR

    return tiny_llava.quantize(MODEL_DIR, folder / scheme, scheme)


def report(outcome: Outcome, clients: int, seconds: float, warm_up: float) -> int:
    """Print the table; 1 if a goal is missed."""
    first, last, growth = outcome.growth(warm_up)
    answered = outcome.statuses[200]
    differing = Counter(outcome.near_ties + outcome.wrong)
    rows = {
        "clients, seconds": f"{clients}, {seconds:.0f}",
        "requests": f"{outcome.statuses.total() + sum(outcome.errors.values())}",
        "answered": f"{answered} ({answered / seconds:.1f} a second)",
        "refused with 503": f"{outcome.statuses[503]}",
        "other errors": f"{sum(outcome.errors.values())}",
        "seconds per answer, median and 99th percentile": (
            f"{statistics.median(outcome.seconds):.2f}, "
            f"{statistics.quantiles(outcome.seconds, n=100)[-1]:.2f}"
        ),
        f"memory after {warm_up:.0f} s and at the end": (
            f"{first:.0f} MiB, {last:.0f} MiB ({growth:+.1%})"
        ),
        "answers unlike the quiet server's": (
            f"{len(outcome.near_ties) + len(outcome.wrong)}, of which near ties "
            f"(under {NEAR_TIE} nats) {len(outcome.near_ties)}"
        ),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    for error, count in outcome.errors.most_common(5):
        print(f"{count} x {error}")
    for shown, count in differing.most_common(10):
        print(f"{count} x {shown}")
    return int(bool(outcome.errors or growth >= GROWTH_LIMIT or outcome.wrong))


def main() -> int:
    """Print the table; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--warm-up", type=float, default=30)
    parser.add_argument("--max-num-seqs", default="64")
    parser.add_argument("--json", type=Path, help="write what was counted there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = args.directory or bundled(args.scheme, Path(folder))
        flags = ["--max-num-seqs", args.max_num_seqs]
        with running(directory, Path(folder) / "server.log", flags) as (url, pid):
            outcome = asyncio.run(load(url, pid, args.clients, args.seconds))
    if args.json:
        args.json.write_text(json.dumps(vars(outcome)))
    return report(outcome, args.clients, args.seconds, args.warm_up)


if __name__ == "__main__":
    sys.exit(main())
