"""A small checkpoint, questions about pictures, and what one quiet server answers to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from helpers import tiny_llava
from helpers.fleet import FLAGS, HEADERS
from helpers.server_process import ENGINE, START_SECONDS, Server, environment, start_server

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.questions import write_jsonl
from qig_serve.serving.batch_io import URL, answer_text, embed_pictures

QUESTIONS = 16


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model, w4a8, rounded."""
    return tiny_llava.quantize(MODEL_DIR, tmp_path_factory.mktemp("checkpoint") / "w4a8", "w4a8")


@pytest.fixture(scope="session")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions in OpenAI's batch form, pictures beside it, greedy."""
    samples = write_jsonl("test", QUESTIONS, tmp_path_factory.mktemp("batch"))
    path = samples.with_name("batch.jsonl")
    with path.open("w") as file:
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            body = {"model": "tiny", "messages": sample["messages"], "max_tokens": 24}
            row = {"custom_id": sample["id"], "method": "POST", "url": URL}
            file.write(json.dumps(row | {"body": body | {"temperature": 0}}) + "\n")
    return path


@pytest.fixture(scope="session")
def bodies(batch: Path) -> list[dict[str, Any]]:
    """Requests with their pictures in them."""
    rows = map(json.loads, batch.read_text().splitlines())
    return [embed_pictures(row["body"], batch.parent) for row in rows]


@pytest.fixture(scope="session")
def generated(checkpoint: Path, batch: Path) -> dict[str, str]:
    """What `qig-serve generate` answers, by custom_id, in the order of the batch."""
    output = batch.with_name("generated.jsonl")
    command = [sys.executable, "-m", "qig_serve", "generate", str(checkpoint), *ENGINE]
    done = subprocess.run(
        [*command, "--served-model-name", "tiny", "-i", str(batch), "-o", str(output)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=3 * START_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rows.sort(key=lambda row: row["line"])
    return {row["custom_id"]: answer_text(row) for row in rows}


@pytest.fixture(scope="session")
def servers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers with a key; a test that stops one puts another in its place."""
    folders = [tmp_path_factory.mktemp("server") for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        started = list(pool.map(lambda folder: start_server(checkpoint, folder, *FLAGS), folders))
    yield started
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def alone(servers: list[Server], bodies: list[dict[str, Any]]) -> list[str]:
    """The answers of the first server, asked one question at a time."""
    import httpx

    texts = []
    for body in bodies:
        answer = httpx.post(
            servers[0].url + URL,
            json=body,
            headers=HEADERS,
            timeout=120,
        )
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert len(set(texts)) > QUESTIONS // 2  # or a wrong answer would not show
    return texts
