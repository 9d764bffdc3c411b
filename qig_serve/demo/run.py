"""The whole way on the bundled model: quantize, serve, ask, evaluate, and print the table.

Nothing is mocked: the checkpoints are written by the offline stage, the answers are vLLM's, and
one question goes over HTTP to a server that runs as a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.http_clients import open_loopback, openai_client
from qig_serve.json_output import write_json

SCHEMES = ("w3a16", "w4a8")
METHODS = ("rtn", "qig", "qig+")
SERVED = ("w3a16", "qig+")
"""The checkpoint that is put behind the server."""
ASKED = 7
"""Index in the test split of the question that is asked over HTTP: the first caption."""
START_SECONDS = 600
SERVER_OPTIONS = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4")


def run_demo(
    workdir: Path, json_path: Path | None, questions: int, samples: int, quiet: bool
) -> dict[str, Any]:
    """Run every step with visible progress unless `quiet`.

    Returns (and writes to `json_path`) the figures.
    """
    from rich.console import Console

    from qig_serve.demo import MODEL_DIR
    from qig_serve.evaluate import evaluate_many, load_samples
    from qig_serve.evaluation.table import print_whole, progress_bars, results_table

    require("openai", "the demonstration")
    console = Console(quiet=quiet)
    started = time.monotonic()
    checkpoints = _quantize_all(console, workdir, MODEL_DIR, samples, quiet)

    console.rule("[bold]Serving " + _name(*SERVED))
    with _server(checkpoints[SERVED], workdir / "server.log", console) as url:
        asked = _ask(url, workdir / "picture.png", console)

    console.rule(f"[bold]Evaluating on {questions} held-out questions")
    with progress_bars(console, quiet) as progress:
        results = evaluate_many(
            [(_name(*key), path) for key, path in checkpoints.items()],
            MODEL_DIR,
            load_samples("demo", questions),
            progress=progress,
        )

    console.rule("[bold]What quantization cost")
    print_whole(console, results_table(results))
    record: dict[str, Any] = {"fp": results["fp"].to_json()}
    for scheme in SCHEMES:
        record[scheme] = {m: results[_name(scheme, m)].to_json() for m in METHODS}
    record["server"] = asked
    if json_path is not None:
        write_json(json_path, record)
        console.print(f"figures: {json_path}", highlight=False)
    console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    return record


def _name(scheme: str, method: str) -> str:
    return f"{scheme} {method}"


def _quantize_all(
    console: Any, workdir: Path, model: Path, samples: int, quiet: bool
) -> dict[tuple[str, str], Path]:
    """Both schemes by all methods; checkpoints of an earlier demonstration are replaced."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import QuantRecipe

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = {}
    for scheme in SCHEMES:
        for method in METHODS:
            console.rule(f"[bold]Quantizing: {_name(scheme, method)}")
            output = workdir / f"{scheme}-{method}"
            if output.exists():
                shutil.rmtree(output)
            recipe = QuantRecipe.model_validate(
                {"scheme": scheme, "method": method, "calib": "demo", "samples": samples}
            )
            quantize(model, output, recipe, quiet=quiet)
            checkpoints[scheme, method] = output
    return checkpoints


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _server(checkpoint: Path, log: Path, console: Any) -> Iterator[str]:
    """`qig-serve serve` as a process of its own; stopped on the way out."""
    port = _free_port()
    command = [sys.executable, "-P", "-m", "qig_serve", "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
    command += SERVER_OPTIONS
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ)
    console.print(f"$ qig-serve {' '.join(command[4:])}", highlight=False, soft_wrap=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with console.status("starting vLLM") as status:
            began = time.monotonic()
            while not _healthy(url):
                waited = time.monotonic() - began
                status.update(f"starting vLLM: {waited:.0f} s")
                if process.poll() is not None or waited > START_SECONDS:
                    raise UserError(f"the server did not start; its output is in {log}")
                time.sleep(1)
        console.print(f"up after {time.monotonic() - began:.0f} s at {url}", highlight=False)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with open_loopback(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _ask(url: str, picture: Path, console: Any) -> dict[str, str]:
    """One question about one held-out picture, through the official client."""
    from qig_serve.demo.questions import make_sample
    from qig_serve.samples import data_url

    sample = make_sample("test", ASKED)
    sample.image.save(picture)
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(sample.image)}},
        {"type": "text", "text": sample.question},
    ]
    with openai_client(url, "none", timeout=120, purpose="the demonstration") as client:
        reply = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content}],
            max_tokens=160,
            temperature=0,
        )
    answer = (reply.choices[0].message.content or "").strip()
    console.print(f"picture:  {picture}", highlight=False)
    console.print(f"question: {sample.question}", highlight=False)
    console.print(f"answer:   [bold]{answer}[/bold]", highlight=False)
    console.print(f"expected: {sample.answer}", highlight=False)
    return {"question": sample.question, "answer": answer, "expected": sample.answer}
