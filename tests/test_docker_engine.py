"""The CPU image in a Docker engine, as compose.yaml runs it (slow; port 8000).

    docker build -f docker/Dockerfile.cpu -t qig-serve:cpu .
    pytest -m slow tests/test_docker_engine.py

Skipped where no engine has that image; test_docker_image.py needs neither.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qig_serve.demo.questions import Question, samples
from qig_serve.samples import data_url

pytestmark = pytest.mark.slow

COMPOSE_FILE = Path(__file__).resolve().parents[1] / "docker" / "compose.yaml"
IMAGE, SERVER = "qig-serve:cpu", "qig-engine-test-cpu"
ANYONE = ("--user", "12345:0", "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/home/qig:mode=1777")


def run(*command: str, environment: dict[str, str] | None = None, timeout: float = 1200) -> str:
    """A command's standard output; it has to succeed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """An engine that has the image, or these tests are skipped."""
    command = ["docker", "image", "inspect", IMAGE]
    if shutil.which("docker") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"needs a Docker engine that has {IMAGE}")


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Compose as the engine's plugin; or version 1, which knows no project's name in the file."""
    project = ["-p", SERVER.removesuffix("-cpu"), "--project-directory", str(COMPOSE_FILE.parent)]
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    if plugin:
        return ["docker", "compose", *project, "-f", str(COMPOSE_FILE), "--profile", "cpu"]
    copy = tmp_path_factory.mktemp("compose") / "compose.yaml"
    lines = COMPOSE_FILE.read_text().splitlines(keepends=True)
    copy.write_text("".join(line for line in lines if not line.startswith("name:")))
    return ["docker-compose", *project, "-f", str(copy), "--profile", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demonstration model and its checkpoint, both of containers of any user."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o777)
    for path in folder.parents:
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    once = ("docker", "run", "--rm", *ANYONE, "-v", f"{folder}:/mnt", IMAGE)
    run(*once, "demo", "export", "--output", "/mnt/demo")
    calibration = ("--calib", "demo", "--samples", "16")
    quantize = ("quantize", "/mnt/demo", "--scheme", "w3a16", "--method", "gptq", *calibration)
    run(*once, *quantize, "--output", "/mnt/demo-w3a16")
    assert "verified" in run(*once, "inspect", "--verify", "/mnt/demo-w3a16")
    return folder


def test_a_batch(models: Path) -> None:
    bodies = [{**body(s), "model": "demo-w3a16"} for s in samples("test", 8)]
    lines = [json.dumps({"custom_id": str(i), "body": body}) for i, body in enumerate(bodies)]
    (models / "batch.jsonl").write_text("\n".join(lines) + "\n")
    mount = ("-v", f"{models}:/mnt", "--shm-size", "1g", "-e", "VLLM_CPU_KVCACHE_SPACE=1")
    command = ("generate", "/mnt/demo-w3a16", "-i", "/mnt/batch.jsonl", "-o", "/mnt/out.jsonl")
    run("docker", "run", "--rm", *ANYONE, *mount, IMAGE, *command)
    assert len((models / "out.jsonl").read_text().splitlines()) == 8


def body(sample: Question) -> dict[str, object]:
    """A request about a sample's picture."""
    image = {"type": "image_url", "image_url": {"url": data_url(sample.image)}}
    content = [image, {"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    return {"model": "qig", "messages": messages, "temperature": 0, "max_tokens": 64}


@pytest.fixture
def server(models: Path, compose: list[str]) -> Iterator[str]:
    """compose.yaml's server, healthy; its container's id."""
    settings = {
        "MODEL_DIR": str(models / "demo-w3a16"),
        "VLLM_API_KEY": "open sesame",
        "CPUS": str(os.cpu_count()),
        "MEM_LIMIT": "8g",
    }
    try:
        run(*compose, "up", "-d", "--no-build", "cpu", environment=settings)
        (identity,) = run(*compose, "ps", "-q", "cpu", environment=settings).split()
        deadline = time.monotonic() + 900
        while state(identity)["Health"]["Status"] != "healthy":
            assert state(identity)["Running"], run("docker", "logs", identity)
            assert time.monotonic() < deadline, run("docker", "logs", identity)
            time.sleep(3)
        yield identity
    finally:
        run(*compose, "down", "-v", environment=settings)


def state(identity: str) -> dict[str, Any]:
    """What the engine says of a container."""
    found: dict[str, Any] = json.loads(run("docker", "inspect", identity))[0]["State"]
    return found


def test_compose_serves_is_healthy_answers_and_stops(server: str) -> None:
    key = {"Authorization": "Bearer open sesame"}
    with httpx.Client(base_url="http://127.0.0.1:8000", timeout=120, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        asked = list(samples("test", 8))
        answers = [
            client.post("/v1/chat/completions", json=body(s), headers=key).json() for s in asked
        ]
        assert "vllm:" in client.get("/metrics", headers=key).text
    said = [a["choices"][0]["message"]["content"].strip() for a in answers]
    right = sum(word == sample.answer for word, sample in zip(said, asked, strict=True))
    assert right >= 5, said
    run("docker", "stop", "--time", "60", server)
    ended = state(server)
    assert ended["ExitCode"] == 0 and not ended["OOMKilled"], run("docker", "logs", server)
