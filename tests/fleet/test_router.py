"""vLLM's router before two servers, with the flags that docker/compose.yaml gives it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm_router", reason="no router here: pip install vllm-router==0.1.17")

import httpx
import yaml
from helpers.fleet import FLAGS, HEADERS, KEY
from helpers.load import CLIENTS, REQUESTS, ask, assert_none_wrong, assert_right, under_load
from helpers.server_process import START_SECONDS, Server, free_port, start_server

pytestmark = pytest.mark.slow

COMPOSE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"


@dataclass
class Router:
    """A router process."""

    port: int
    metrics_port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def healthy(self) -> int:
        """How many servers it sends requests to."""
        answer = httpx.get(f"{self.url}/readiness", timeout=10).json()
        return int(answer.get("healthy_workers", 0))

    def wait_for(self, healthy: int) -> float:
        """Seconds until it has so many."""
        began = time.monotonic()
        while self.healthy() != healthy:
            assert time.monotonic() - began < START_SECONDS, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def router(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    made = Router(free_port(), free_port(), tmp_path_factory.mktemp("router") / "router.log")
    here = {
        "0.0.0.0": "127.0.0.1",
        "8000": str(made.port),
        "29000": str(made.metrics_port),
        "http://replica-0:8000": servers[0].url,
        "http://replica-1:8000": servers[1].url,
    }
    words = yaml.safe_load(COMPOSE.read_text())["services"]["router"]["command"]
    command = [sys.executable, "-m", "vllm_router.launch_router"]
    with made.log.open("wb") as log:
        process = subprocess.Popen(
            [*command, *(here.get(word, word) for word in words)], stdout=log, stderr=log
        )
    while True:
        try:
            made.wait_for(2)
            break
        except httpx.TransportError:
            assert process.poll() is None, made.log.read_text()[-3000:]
            time.sleep(0.5)
    yield made
    process.terminate()
    process.wait(timeout=60)


def answered(server: Server) -> int:
    """Requests that a server has finished, of its metrics."""
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=30).text
    return int(sum(map(float, re.findall(r"^vllm:request_success_total\S* (\S+)", text, re.M))))


def test_answers_are_a_single_servers(
    router: Router, servers: list[Server], bodies: list[dict[str, Any]], alone: list[str]
) -> None:
    before = [answered(server) for server in servers]
    answers, _ = under_load(router.url, KEY, bodies)
    assert_right(answers, alone)
    shares = [answered(server) - had for server, had in zip(servers, before, strict=True)]
    assert sum(shares) == REQUESTS and min(shares) > REQUESTS // 4, shares


def test_key_and_limits_are_the_servers(router: Router, bodies: list[dict[str, Any]]) -> None:
    chat = f"{router.url}/v1/chat/completions"
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.post(chat, json=bodies[0], headers=headers).status_code == 401
        assert httpx.get(f"{router.url}/v1/models", headers=headers).status_code == 401
    picture = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    remote = bodies[0] | {"messages": [{"role": "user", "content": [picture]}]}
    assert httpx.post(chat, json=remote, headers=HEADERS).status_code == 400
    # SECURITY.md: the router's own routes know no key.
    assert len(httpx.get(f"{router.url}/workers").json()["workers"]) == 2
    metrics = httpx.get(f"http://127.0.0.1:{router.metrics_port}/metrics").text
    assert "vllm_router_active_workers 2" in metrics


def test_a_stopped_server_is_drained(
    router: Router,
    servers: list[Server],
    checkpoint: Path,
    bodies: list[dict[str, Any]],
    alone: list[str],
) -> None:
    """SIGTERM under 50 clients: every answer whole and right; then one server, then two again."""
    answers, status = under_load(router.url, KEY, bodies, servers[1].stop)
    assert_right(answers, alone)
    assert status == 0, servers[1].output[-3000:]
    print(f"\nout {router.wait_for(1):.1f} s after the exit")
    old = servers[1]
    servers[1] = start_server(checkpoint, old.log.parent, *FLAGS, port=old.port)
    router.wait_for(2)


def test_a_killed_server_answers_nothing_wrongly(
    router: Router, servers: list[Server], bodies: list[dict[str, Any]], alone: list[str]
) -> None:
    """kill -9 under 50 clients: what it had in hand fails or is answered by the other one."""
    answers, _ = under_load(router.url, KEY, bodies, servers[1].kill)
    assert_none_wrong(answers, alone)
    assert sum(answer.whole for answer in answers) >= REQUESTS - CLIENTS
    print(f"out after {router.wait_for(1):.1f} s")
    assert_right([ask(router.url, KEY, i, bodies, False) for i in range(8)], alone)
