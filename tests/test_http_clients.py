"""Loopback is never asked through a proxy; proxies, addresses and servers of no use are named."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from PIL import Image

from qig_serve.errors import UserError
from qig_serve.evaluation import generation
from qig_serve.evaluation.generation import ask_server
from qig_serve.http_clients import (
    is_loopback,
    open_loopback,
    openai_client,
    proxy_in_words,
    within,
)
from qig_serve.samples import sample_from_parts

DEAD = "http://127.0.0.1:9"
"""A proxy that refuses every connection."""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


MODELS = {"object": "list", "data": [{"id": "m", "object": "model"}]}


@contextmanager
def answering(models: Any, answer: Any) -> Iterator[str]:
    """A server on loopback that says this to every GET, and that to every POST: JSON, or text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, value: Any = models) -> None:
            is_text = isinstance(value, str)
            body = (value if is_text else json.dumps(value)).encode()
            self.send_response(200)
            self.send_header("content-type", "text/html" if is_text else "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET(answer)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()


@pytest.fixture
def server() -> Iterator[str]:
    """An OpenAI-compatible server of one model, on loopback."""
    with answering(MODELS, {}) as url:
        yield url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000", True),
        ("http://LOCALHOST./v1", True),
        ("http://a.localhost/", True),
        ("http://127.3.2.1/", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000", True),
        ("http://10.0.0.1/", False),
        ("http://localhost.example/", False),
        ("http://example.org/127.0.0.1", False),
    ],
)
def test_what_is_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


@pytest.mark.parametrize(
    "proxy", [DEAD, "socks5://127.0.0.1:9", "nonsense://x", "http://[", "ftp://h"]
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_loopback_goes_past_every_proxy(
    server: str, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    with open_loopback(f"{server}/health", timeout=5) as answer:
        assert answer.status == 200
    with openai_client(server, "none", timeout=5, purpose="the test") as client:
        assert [model.id for model in client.models.list()] == ["m"]


@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("ALL_PROXY", "nonsense://h:1"),
        ("https_proxy", "nonsense://h:1"),
        ("HTTP_PROXY", "http://h:port"),
    ],
    ids=["scheme", "lower-case", "port"],
)
def test_a_proxy_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    message = rf"proxy of {name}={proxy} cannot be used \(.*unset {name}"
    with pytest.raises(UserError, match=message):
        openai_client("http://example.org", "none", timeout=5, purpose="the test")


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://me:secret@h:1")
    with pytest.raises(UserError) as caught:
        openai_client("http://example.org", "none", timeout=5, purpose="the test")
    assert "secret" not in str(caught.value) and "nonsense://...@h:1" in str(caught.value)


def test_a_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    sample = sample_from_parts("1", "all", b"", "", "")
    message = rf"does not answer through the proxy of HTTP_PROXY={DEAD} "
    with pytest.raises(UserError, match=message):
        ask_server("http://example.invalid", [sample], 1, lambda *_: None, None)
    assert proxy_in_words("http://localhost:1") == ""
    monkeypatch.setenv("NO_PROXY", "example.invalid")
    assert proxy_in_words("http://example.invalid") == ""


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://[::1",
        "http://h:x",
        " http://h",
        "http://h?a=b",
        "http://999.1.1.1",
        "",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match=r"is no address of a server: write http://HOST:PORT"):
        openai_client(url, "none", timeout=5, purpose="the test")


@pytest.mark.parametrize("key", ["schlüssel", "a\n", "a\tb"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY.* characters that no request can carry"):
        openai_client("http://h", key, timeout=5, purpose="the test")


NO_MODELS: list[Any] = ["<html>", [], {}, {"data": []}, {"data": None}, {"data": [{}]}, 5]
NO_ANSWERS: list[Any] = [
    *("<html>", [], {}, {"choices": None}, {"choices": []}, {"choices": [{}]}),
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]},
    {"error": {"message": "no"}},
]


@pytest.mark.parametrize("reply", NO_MODELS, ids=str)
def test_a_server_of_another_kind(reply: Any) -> None:
    sample = sample_from_parts("7", "all", Image.new("RGB", (4, 4)), "What?", "a")
    wanted = r"does not answer \(what came is no answer"
    with answering(reply, {}) as url, pytest.raises(UserError, match=wanted):
        ask_server(url, [sample], 1, lambda *_: None, None)


@pytest.mark.parametrize("reply", NO_ANSWERS, ids=str)
def test_answers_that_are_none(reply: Any) -> None:
    """Counted as failed requests, and not as answers."""
    sample = sample_from_parts("7", "all", Image.new("RGB", (4, 4)), "What?", "a")
    with answering(MODELS, reply) as url:
        answers, failures = ask_server(url, [sample], 1, lambda *_: None, None)
    assert answers == [None] and failures[0].startswith("sample 7: what came is no answer of")


@contextmanager
def saying(*parts: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that sends these bytes, whatever it is asked, with a pause after each part."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):  # it hangs up
                connection.recv(1 << 16)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)

        def accept() -> None:
            with contextlib.suppress(OSError):  # until it is shut down
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def _status(line: str) -> bytes:
    return f"HTTP/1.1 {line}\r\ncontent-length: 2\r\n\r\n{{}}".encode()


ADDRESS = "is it running, at this address"


@pytest.mark.parametrize(
    ("reply", "scheme", "wanted"),
    [
        (_status("500 Wrong"), "http", r"answers with an error \(Error code: 500\)$"),
        (_status("429 Slow"), "http", r"answers with an error \(Error code: 429\)$"),
        (_status("401 No"), "http", r"\(Error code: 401\): is OPENAI_API_KEY its key\?$"),
        (_status("404 None"), "http", r"404\): is this the address of a server with Op"),
        (_status("200 OK")[:-1], "http", r"does not answer \(.* RemoteProtocolError: peer .*\)$"),
        (_status("200 OK"), "https", r"does not answer \(.* ConnectError: \[SSL.*\)$"),
        (b"", "http", r"does not answer \(.*: Server disconnected without sending.*\)$"),
    ],
    ids=["500", "429", "401", "404", "cut-off", "tls", "nothing"],
)
def test_why_a_server_does_not_name_its_model(reply: bytes, scheme: str, wanted: str) -> None:
    with saying(reply) as address, pytest.raises(UserError, match=wanted):
        ask_server(f"{scheme}://{address}", [], 1, lambda *_: None, None)


def test_a_client_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment, and not of the address."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    with pytest.raises(UserError, match=r"environment names \(SSL_CERT_FILE.*No such file"):
        openai_client("http://example.org", "none", timeout=5, purpose="the test")

    def refuse(**_: Any) -> None:
        raise openai.OpenAIError("no credentials")

    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(openai, "OpenAI", refuse)
    with pytest.raises(UserError, match="of http://h cannot be made: OpenAIError: no credentials"):
        openai_client("http://h", "none", timeout=5, purpose="the test")


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_sends_a_byte_at_a_time(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pauses are shorter than any timeout of a read: the whole answer has a limit, too."""
    monkeypatch.setattr(generation, "_FIRST_SECONDS", 0.5)
    monkeypatch.setattr(generation, "_ANSWER_SECONDS", 0.5)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n"
    parts = [head, *[b" "] * 90] if part == "body" else [b"HTTP/1.1 200 OK\r\na: ", *[b"a"] * 90]
    sample = sample_from_parts("7", "all", Image.new("RGB", (4, 4)), "What?", "a")
    began = time.monotonic()
    with saying(*parts, pause=0.05) as address:
        with pytest.raises(UserError, match=rf"no whole answer within 0.5 s\): {ADDRESS}"):
            ask_server(f"http://{address}", [], 1, lambda *_: None, None)
        asked = ask_server(f"http://{address}", [sample], 1, lambda *_: None, "m")
    assert asked == ([None], ["sample 7: no whole answer within 0.5 s"])
    assert time.monotonic() - began < 20


def test_what_is_called_within_a_time() -> None:
    def fail() -> None:
        raise TimeoutError("its own")

    assert within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError, match="its own"):
        within(5, fail)


def test_a_url_with_a_password() -> None:
    with pytest.raises(UserError, match=r"http://\.\.\.@127\.0\.0\.1:9 does not answer") as caught:
        ask_server("http://me:secret@127.0.0.1:9", [], 1, lambda *_: None, None)
    assert "secret" not in str(caught.value)
