"""Clients that hang up, an engine that is killed, SIGTERM under load, and routes without a key."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import tiny_llava
from helpers.server_process import Server, engine_of, start_server
from requests_to import (
    CHAT,
    COMPLETIONS,
    ROUTES,
    assert_still_right,
    picture_body,
    plain_body,
)

pytestmark = pytest.mark.slow

KEY = "secret"
LONG = {"max_tokens": 400, "ignore_eos": True}


def unfinished(url: str) -> int:
    """Requests that are running or waiting, as the engine's metrics say."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    wanted = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(wanted)))


def wait_until(count: int, url: str, seconds: float) -> float:
    """Seconds until so many requests are unfinished, no more and no fewer."""
    began = time.monotonic()
    while (now := unfinished(url)) != count:
        waited = time.monotonic() - began
        assert waited < seconds, f"{now} requests after {waited:.1f} s, not {count}"
        time.sleep(0.02)
    return time.monotonic() - began


def start_asking(server: Server, route: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and leave it at that."""
    raw = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + raw)
    return connection


def hang_up(connection: socket.socket, rudely: bool) -> None:
    """Close, or reset."""
    if rudely:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("rudely", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_hanging_up_ends_the_requests(
    server: Server, route: str, stream: bool, rudely: bool
) -> None:
    """24 at once, of which 16 run and 8 wait: none is left within a second."""
    body = plain_body(route) | LONG | {"stream": stream}
    connections = [start_asking(server, route, body) for _ in range(24)]
    wait_until(24, server.url, 30)
    for connection in connections:
        hang_up(connection, rudely)
    waited = wait_until(0, server.url, 10)
    print(f"\nnone left after {waited:.2f} s")
    assert waited <= 1
    assert_still_right(server.url)


def test_hanging_up_at_every_moment(server: Server) -> None:
    """In the head, in the body, and from nothing to a second after it."""
    raw = json.dumps(plain_body(CHAT) | LONG | {"stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n"
    whole = head.encode() + b"Content-Type: application/json\r\n\r\n" + raw
    for cut in range(1, len(whole), 7):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(whole[:cut])
    picture = picture_body(tiny_llava.data_url(tiny_llava.picture(3))) | LONG
    for moment in range(40):
        connection = start_asking(server, CHAT, picture | {"stream": moment % 2 == 0})
        time.sleep((moment / 40) ** 2)
        hang_up(connection, rudely=moment % 3 == 0)
    assert wait_until(0, server.url, 10) <= 1
    assert_still_right(server.url)


def post(server: Server, route: str, body: dict[str, Any]) -> tuple[int, str, int]:
    """Status, finish reason, and the tokens that came."""
    with httpx.Client(timeout=200) as client:
        if not body.get("stream"):
            answer = client.post(server.url + route, json=body)
            found = answer.json()
            if answer.status_code != 200:
                return answer.status_code, "", 0
            choice, usage = found["choices"][0], found["usage"]
            return 200, choice["finish_reason"], usage["completion_tokens"]
        reason, tokens = "", 0
        with client.stream("POST", server.url + route, json=body) as streamed:
            for line in streamed.iter_lines():
                event = line.removeprefix("data: ")
                if not event or event == "[DONE]":
                    continue
                found = json.loads(event)
                if "error" in found:
                    return 500, str(found["error"]), 0
                if found.get("usage"):
                    tokens = found["usage"]["completion_tokens"]
                for choice in found["choices"]:
                    reason = choice["finish_reason"] or reason
            return streamed.status_code, reason, tokens


def long_body(number: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """Both routes, streaming and not."""
    route = ROUTES[number % 2]
    body = plain_body(route) | {"max_tokens": tokens, "ignore_eos": True}
    if number // 2 % 2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return route, body


def test_sigterm_under_load(checkpoint: Path, tmp_path: Path) -> None:
    """What was accepted is finished, half of it waiting when the signal came; new is refused."""
    server = start_server(checkpoint, tmp_path, "--max-num-seqs", "12")
    refused: list[int] = []
    stop_asking = threading.Event()

    def ask_on() -> None:
        while not stop_asking.is_set():
            try:
                answer = httpx.post(
                    server.url + COMPLETIONS, json=plain_body(COMPLETIONS), timeout=60
                )
                refused.append(answer.status_code)
            except httpx.TransportError:
                refused.append(0)
            time.sleep(0.1)

    with ThreadPoolExecutor(25) as pool:
        accepted = [pool.submit(post, server, *long_body(i, 150)) for i in range(24)]
        wait_until(24, server.url, 30)
        stopping: Future[int] = pool.submit(server.stop)
        time.sleep(0.3)
        asking = threading.Thread(target=ask_on)
        asking.start()
        answers = [request.result() for request in accepted]
        status = stopping.result()
        stop_asking.set()
        asking.join()
    assert answers == [(200, "length", 150)] * 24
    assert status == 0, server.output[-3000:]
    print(f"\n24 finished; new: {refused.count(503)} x 503, {refused.count(0)} not connected")
    assert 503 in refused and set(refused) <= {0, 503}


def routes(server: Server) -> list[tuple[str, str]]:
    """(method, path) of all that the server says it answers."""
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.output)
    listed = [(method, path) for path, methods in found for method in methods.split(", ")]
    assert ("POST", CHAT) in listed and ("GET", "/docs") in listed and len(listed) > 25
    return listed + [("GET", "/"), ("GET", "/v1/quantization"), ("GET", "/metrics")]


def raw_status(server: Server, method: str, path: str, **headers: str) -> int:
    """Without a client that tidies the path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_no_route_without_a_key_and_then_the_engine_dies(checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(checkpoint, tmp_path, "--api-key", KEY, "--max-num-seqs", "4")
    keys: list[dict[str, str]] = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": KEY},
        {"Authorization": f"Digest {KEY}"},
        {"Authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()},
        {"X-API-Key": KEY, "api-key": KEY, "Cookie": f"key={KEY}"},
    ]
    tried = 0
    for method, path in routes(server):
        if path == "/health":
            continue
        path = re.sub(r"{[^}]*}", "a", path)
        for headers in keys:
            tried += 1
            assert raw_status(server, method, path, **headers) == 401, (method, path, headers)
    for path in (
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/v1/%6dodels",
        "/health/../v1/models",
        "/health/v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/health/",
        "//health",
        "/v1/models?/health",
        "/v1/models#/health",
        "/nothing",
        f"/v1/models?api_key={KEY}",
        "http://a/v1/models",
    ):
        tried += 1
        assert raw_status(server, "GET", path) == 401, path
    print(f"\n{tried} requests without a key: all 401")
    with_key = {"Authorization": f"Bearer {KEY}"}
    assert raw_status(server, "GET", "/v1/models", **with_key) == 200
    assert raw_status(server, "GET", "/health") == 200

    kill_the_engine(server, with_key)


def kill_the_engine(server: Server, headers: dict[str, str]) -> None:
    """Under load: health turns red, every client hears of it, and the exit status is 1."""
    engine = engine_of(server.process.pid)

    def ask(number: int) -> tuple[float, int]:
        route, body = long_body(number, 400)
        try:
            with httpx.Client(timeout=60) as client:
                answer = client.post(server.url + route, json=body, headers=headers)
            status = 500 if "error" in answer.text else answer.status_code
        except httpx.TransportError:
            status = 0
        return time.monotonic(), status

    with ThreadPoolExecutor(24) as pool:  # four at a time: some are done, some run, some wait
        asked = [pool.submit(ask, number) for number in range(24)]
        time.sleep(1)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        seen: set[int] = set()
        while server.process.poll() is None and time.monotonic() - killed < 60:
            try:
                seen.add(httpx.get(f"{server.url}/health", timeout=5).status_code)
            except httpx.TransportError:
                break
            time.sleep(0.05)
        answers = [request.result() for request in asked]
    assert 503 in seen, seen
    assert server.process.wait(timeout=60) == 1, server.output[-3000:]
    later = [status for when, status in answers if when > killed]
    print(f"gone after {time.monotonic() - killed:.1f} s; answers after the kill: {later}")
    assert len(later) > 8 and later.count(200) <= 4  # four at most were on their way
