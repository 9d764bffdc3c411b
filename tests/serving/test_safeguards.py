"""The middleware around a stand-in application: keys, sizes, queue, stopping."""

from __future__ import annotations

import asyncio
import base64
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

import fastapi
import httpx
import pydantic
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qig_serve.serving import engine_watch
from qig_serve.serving.engine_watch import EngineWatch
from qig_serve.serving.limits import Limits
from qig_serve.serving.safeguards import Safeguards

ROUTES = ("/v1/models", "/v1/quantization", "/metrics", "/version", "/openapi.json", "/", "/docs")


def server_arguments(keys: list[str] | None) -> Namespace:
    """Of vLLM's server, those that the middleware reads."""
    return Namespace(
        api_key=keys,
        allowed_origins=["https://page.example"],
        allow_credentials=True,
        allowed_methods=["GET", "POST"],
        allowed_headers=["*"],
    )


def make_app(
    handler: Callable[[Request], Any],
    keys: list[str] | None = None,
    engine: EngineWatch | None = None,
) -> Starlette:
    """An application with the middleware, as vLLM's would have it."""

    async def health(_: Request) -> Response:
        return Response()

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/{path:path}", handler, methods=["GET", "POST", "DELETE"]),
        ]
    )
    app.state.args = server_arguments(keys)
    app.add_middleware(Safeguards, engine=engine or EngineWatch())
    return app


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


async def echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"bytes": len(body), "authorization": request.headers.get("authorization")})


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIG_SERVE_MAX_BODY_MB", "1")
    monkeypatch.setenv("QIG_SERVE_MAX_QUEUED_REQUESTS", "2")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_limits_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_BODY_MB", "MAX_IMAGE_PIXELS", "MAX_QUEUED_REQUESTS"):
        monkeypatch.setenv(f"QIG_SERVE_{name}", "0")  # so that it is put back
    Limits(7, 8, 9).to_environment()
    assert Limits.from_environment() == Limits(7, 8, 9)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD"])
def test_key_covers_every_route_but_health(method: str) -> None:
    async def run() -> None:
        async with client(make_app(echo, ["secret", "other"])) as http:
            assert (await http.get("/health")).status_code == 200
            for route in ROUTES:
                for headers in (
                    {},
                    {"Authorization": "Bearer wrong"},
                    {"Authorization": "Bearer "},
                    {"Authorization": "secret"},
                    {"Authorization": "Basic !!!"},
                    {"Authorization": "Basic " + base64.b64encode(b"secret").decode()},
                ):
                    refused = await http.request(method, route, headers=headers)
                    assert refused.status_code == 401, (route, headers)
            passed = await http.get("/v1/models", headers={"Authorization": "Bearer other"})
            assert passed.status_code == 200

    asyncio.run(run())


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def run() -> None:
        async with client(make_app(echo)) as http:
            assert (await http.get("/v1/models")).status_code == 401

    asyncio.run(run())


def test_browser_gives_the_key_as_a_password() -> None:
    """HTTP Basic opens the page, and reaches vLLM's own check as Bearer."""

    async def run() -> None:
        async with client(make_app(echo, ["secret"])) as http:
            asked = await http.get("/")
            assert asked.headers["www-authenticate"].startswith("Basic ")
            basic = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
            page = await http.get("/", headers=basic)
            assert page.text.startswith("<!doctype html>")
            inner = await http.post("/v1/chat/completions", headers=basic)
            assert inner.json()["authorization"] == "Bearer secret"

    asyncio.run(run())


def test_body_limit_with_and_without_a_length() -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 65536

    async def run() -> None:
        async with client(make_app(echo)) as http:
            fits = await http.post("/v1/completions", content=b"x" * (1 << 20))
            assert fits.json()["bytes"] == 1 << 20
            for content in (b"x" * ((1 << 20) + 1), chunks(17)):
                refused = await http.post("/v1/completions", content=content)
                assert refused.status_code == 400
                assert "over 1 MiB" in refused.json()["error"]["message"]
            assert (await http.post("/v1/completions", content=chunks(16))).status_code == 200
            odd = await http.post("/v1/completions", headers={"Content-Length": "-1"})
            assert odd.status_code == 400

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (rb'{"stop": ["a", "\ud800"]}', r"\ud800 is half of a surrogate pair"),
        (rb'{"\uDC00": 1}', r"\udc00 is half of a surrogate pair"),
        (b'{"a": {"b": [1, 18446744073709551616]}}', "a whole number beyond 64 bits"),
        (b'{"a": -9223372036854775809}', "a whole number beyond 64 bits"),
        (rb'{"a": "\ud83d\ude00", "b": 18446744073709551615, "c": 1e30}', None),
        (rb'{"a": "\ud800"', None),
    ],
    ids=["half-in-a-list", "half-in-a-key", "beyond-64-bits", "below-64-bits", "fine", "no-json"],
)
def test_bodies_that_cannot_be_passed_on(body: bytes, fault: str | None) -> None:
    async def run() -> None:
        async with client(make_app(echo)) as http:
            answer = await http.post("/v1/completions", content=body)
            if fault is None:
                assert answer.json()["bytes"] == len(body)
            else:
                assert answer.status_code == 400 and fault in answer.json()["error"]["message"]

    asyncio.run(run())


def test_client_that_hangs_up_while_it_sends() -> None:
    """Nothing reaches the application, and the place in the queue is free again."""
    app = make_app(echo)
    sent: list[Any] = []
    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope | {"query_string": b"", "root_path": ""}, receive, send)
        async with client(app) as http:
            assert (await http.post("/v1/completions", content=b"{}")).status_code == 200

    asyncio.run(run())
    assert not sent and not messages


class Careless(pydantic.BaseModel):
    """A body whose validator looks before it checks."""

    options: dict[str, Any]

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def look_inside(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        data["options"].get("a")
        return handler(data)


def test_body_that_breaks_its_own_validation() -> None:
    """400, where the framework answers 500; a fault of the application stays one."""

    app = fastapi.FastAPI()
    app.state.args = server_arguments(None)
    app.add_middleware(Safeguards)

    @app.post("/v1/completions")
    async def complete(body: Careless) -> Any:
        return body.options.nothing  # type: ignore[attr-defined]

    async def run() -> None:
        async with client(app) as http:
            refused = await http.post("/v1/completions", json={"options": "text"})
            assert refused.status_code == 400
            assert "'str' object has no attribute 'get'" in refused.json()["error"]["message"]
            with pytest.raises(AttributeError, match="nothing"):
                await http.post("/v1/completions", json={"options": {}})
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.post("/v1/completions", json={"options": {}})).status_code == 500

    asyncio.run(run())


def test_queue_is_bounded_and_health_answers() -> None:
    gate = asyncio.Event()

    async def wait(_: Request) -> Response:
        await gate.wait()
        return Response()

    async def run() -> None:
        async with client(make_app(wait)) as http:
            held = [asyncio.create_task(http.post("/v1/chat/completions")) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await http.post("/v1/chat/completions")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert (await http.get("/health")).status_code == 200
            gate.set()
            assert [(await task).status_code for task in held] == [200, 200]
            assert (await http.post("/v1/chat/completions")).status_code == 200

    asyncio.run(run())


def test_failures_free_their_place_in_the_queue() -> None:
    async def fail(_: Request) -> Response:
        raise RuntimeError("broken")

    async def run() -> None:
        async with client(make_app(fail)) as http:
            for _ in range(3):
                with pytest.raises(RuntimeError, match="broken"):
                    await http.post("/v1/chat/completions")

    asyncio.run(run())


def test_stopping_refuses_new_requests() -> None:
    engine = EngineWatch()
    engine.stopping = True

    async def run() -> None:
        async with client(make_app(echo, engine=engine)) as http:
            refused = await http.post("/v1/chat/completions")
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert (await http.get("/health")).status_code == 503
            engine.stopping = False
            assert (await http.get("/health")).status_code == 200

    asyncio.run(run())


class StandInReport:
    """Of a checkpoint; counts how often it is turned into JSON."""

    made = 0

    def as_json(self) -> dict[str, Any]:
        StandInReport.made += 1
        return {"scheme": "w3a16"}


@pytest.mark.parametrize(("asked", "died"), [(True, False), (False, True)], ids=["asked", "died"])
def test_a_dead_engine_is_not_a_stopped_one(
    asked: bool, died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "describe_engine", lambda client: StandInReport())
    monkeypatch.setattr(engine_watch, "publish_metrics", lambda report: None)
    watch = EngineWatch()

    class Engine:
        errored = False
        generate = None

        def shutdown(self, timeout: float) -> None:
            self.errored = True

    app = make_app(echo, engine=watch)
    engine: Any = Engine()
    app.state.engine_client = engine

    async def run() -> None:
        events = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict[str, str]:
            event = next(events)
            if event == "lifespan.shutdown":
                if asked:
                    engine.shutdown(timeout=1)
                engine.errored = True
            return {"type": event}

        async def send(message: Any) -> None:
            assert message["type"].endswith("complete")

        await app({"type": "lifespan", "app": app, "asgi": {}, "state": {}}, receive, send)

    asyncio.run(run())
    assert watch.died is died and watch.stopping is asked


def test_the_checkpoint_is_read_once_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "describe_engine", lambda client: StandInReport())
    monkeypatch.setattr(engine_watch, "publish_metrics", lambda report: None)
    monkeypatch.setattr(StandInReport, "made", 0)
    watch = EngineWatch()
    app = make_app(echo, engine=watch)
    app.state.engine_client = Namespace(shutdown=lambda: None, generate=None, errored=False)

    async def run() -> None:
        async with client(app) as http:
            early = await http.get("/v1/quantization")
            assert early.status_code == 503 and "starting" in early.json()["error"]["message"]

            async def receive() -> dict[str, str]:
                return {"type": "lifespan.startup"}

            await watch.follow({"app": app}, receive)()
            for _ in range(3):
                assert (await http.get("/v1/quantization")).json() == {"scheme": "w3a16"}
            assert StandInReport.made == 1

    asyncio.run(run())


PAGE = {"Origin": "https://page.example"}


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("GET", "/v1/models", b"", {}, 401),
        ("GET", "/", b"", {}, 401),
        ("GET", "/", b"", {"Authorization": "Bearer secret"}, 200),
        ("GET", "/v1/quantization", b"", {"Authorization": "Bearer secret"}, 503),
        ("POST", "/v1/completions", b"x" * 2**21, {"Authorization": "Bearer secret"}, 400),
        ("POST", "/v1/completions", rb'{"a": "\ud800"}', {"Authorization": "Bearer secret"}, 400),
        ("POST", "/v1/completions", b"{}", {"Authorization": "Bearer secret"}, 503),
    ],
    ids=["no-key", "page-no-key", "page", "starting", "too-large", "half-a-pair", "stopping"],
)
def test_own_answers_carry_cors_headers(
    method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    engine = EngineWatch()
    engine.stopping = status == 503

    async def run() -> None:
        async with client(make_app(echo, ["secret"], engine)) as http:
            for origin, allowed in (
                (PAGE, "https://page.example"),
                ({"Origin": "https://other.example"}, None),
                ({}, None),
            ):
                answer = await http.request(
                    method, path, content=content, headers={**headers, **origin}
                )
                assert answer.status_code == status
                assert answer.headers.get("access-control-allow-origin") == allowed
                with_credentials = answer.headers.get("access-control-allow-credentials")
                assert with_credentials == ("true" if origin else None)

    asyncio.run(run())
