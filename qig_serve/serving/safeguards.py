"""What every request passes before it reaches vLLM: key, size, queue; and our own two routes.

A plain ASGI middleware, given to vLLM with its own `--middleware` flag: the outermost one, and
the same in each API process.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
import importlib.resources
import traceback
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qig_serve.serving import media  # noqa: F401  registers the media connector in this process
from qig_serve.serving.describe import Report, describe
from qig_serve.serving.json_faults import find_fault
from qig_serve.serving.limits import Limits

HEALTH = "/health"
RETRY_AFTER_SECONDS = 5

engine_died = False
"""Whether this process's engine died, rather than being stopped: the exit status depends on it."""

_stopping = False
"""Whether the server was told to stop and only finishes what is running."""


class Safeguards:
    """API key on every route but health, body limit, bounded queue, `/` and `/v1/quantization`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        limits = Limits.from_environment()
        self.max_body = limits.max_body_mb << 20
        self.max_queued = limits.max_queued_requests
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "lifespan":
            await self.app(scope, _watch_engine(scope, receive), send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == HEALTH or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        if not _authorize(scope):
            await _reject_unauthorized(scope, path)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            own = {"/": _page, "/v1/quantization": _quantization}.get(path)
            await (own(scope) if own else self.app)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self._bounded(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body:
            await self._too_large()(scope, receive, send)
            return
        if _stopping or self.running >= self.max_queued:
            reason = "the server is stopping" if _stopping else f"{self.running} requests are ahead"
            busy = _error(503, f"{reason}: try again later")
            busy.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
            await busy(scope, receive, send)
            return
        self.running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive, self.max_body)
        if body is None:  # the client hung up
            return
        if len(body) > self.max_body:
            await self._too_large()(scope, receive, send)
            return
        if fault := find_fault(body):
            await _error(400, f"the request body is not valid: {fault}")(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return unread.pop() if unread else await receive()

        answer = _HeldFault(send)
        try:
            await self.app(scope, read, answer.send)
        except Exception as error:
            if not _in_validation(error):
                await answer.release()
                raise
            refusal = _error(400, f"the request body is not valid: {error}")
            await refusal(scope, receive, send)
        else:
            await answer.release()

    def _too_large(self) -> Response:
        return _error(400, f"the request body is over {self.max_body >> 20} MiB (--max-body-mb)")


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or what of it goes over `limit` bytes; None if the client hangs up."""
    pieces: list[bytes] = []
    size, more = 0, True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        more = message.get("more_body", False)
    return b"".join(pieces)


class _HeldFault:
    """Sends an answer on, but keeps a 500 until it is known whose fault it was."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []

    async def send(self, message: Message) -> None:
        """Send or keep."""
        if self._held or message.get("status") == 500:
            self._held.append(message)
        else:
            await self._send(message)

    async def release(self) -> None:
        """Send what was kept."""
        for message in self._held:
            await self._send(message)


def _in_validation(error: Exception) -> bool:
    """Whether the body was still being validated: it is at fault, and not the server.

    vLLM's validators look into fields before their types are checked, and fail in any way.
    """
    return any(
        frame.f_code.co_name == "request_body_to_args"
        and frame.f_globals["__name__"] == "fastapi.dependencies.utils"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _error(status: int, message: str) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kinds = {400: "BadRequestError", 401: "AuthenticationError", 503: "ServiceUnavailableError"}
    error = {"message": message, "type": kinds[status], "param": None, "code": status}
    return JSONResponse({"error": error}, status)


def _keys(scope: Scope) -> list[str]:
    import vllm.envs

    keys = scope["app"].state.args.api_key or [vllm.envs.VLLM_API_KEY]
    return [key for key in keys if key]


def _authorize(scope: Scope) -> bool:
    """Whether the request carries a key, if there are keys.

    A browser that opens the page at `/` sends the key as the password of HTTP Basic; vLLM's own
    check further in wants Bearer, so the header is rewritten.
    """
    keys = _keys(scope)
    if not keys:
        return True
    kind, _, value = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind.lower() != "bearer":
        return False
    matches = [hmac.compare_digest(value.encode(), key.encode()) for key in keys]
    if not any(matches):
        return False
    MutableHeaders(scope=scope)["authorization"] = f"Bearer {value}"
    return True


def _reject_unauthorized(scope: Scope, path: str) -> ASGIApp:
    if scope["type"] == "websocket":

        async def close(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "websocket.close", "code": 1008})

        return close
    refusal = _error(401, "a valid API key is needed: Authorization: Bearer KEY")
    if path == "/":  # so that a browser asks for it
        refusal.headers["WWW-Authenticate"] = 'Basic realm="API key as password"'
    return refusal


@functools.cache
def _page_source() -> str:
    return importlib.resources.files(__package__).joinpath("playground.html").read_text("utf-8")


def _page(scope: Scope) -> Response:
    return HTMLResponse(_page_source(), headers={"Cache-Control": "no-store"})


def _report(app: Any) -> Report:
    config = app.state.engine_client.vllm_config
    tower = config.model_config.multimodal_config
    return describe(
        Path(config.model_config.model),
        config.model_config.dtype,
        config.parallel_config.tensor_parallel_size,
        config.parallel_config.pipeline_parallel_size,
        split_vision_tower=not (tower.language_model_only or tower.mm_encoder_tp_mode == "data"),
    )


def _quantization(scope: Scope) -> Response:
    return JSONResponse(_report(scope["app"]).as_json())


def _publish_metrics(report: Report) -> None:
    """Gauges for /metrics: which kernel serves how many layers, and the weights' bytes."""
    scheme = report.manifest.scheme
    layers = Gauge(
        "qig_layers", "Quantized layers by kernel", ["scheme", "kernel"], multiprocess_mode="max"
    )
    for kernel, count in report.kernels.items():
        layers.labels(scheme, kernel).set(count)
    stored = Gauge(
        "qig_weight_bytes", "Bytes of stored weights", ["scheme", "part"], multiprocess_mode="max"
    )
    stored.labels(scheme, "quantized").set(report.quantized_bytes)
    stored.labels(scheme, "other").set(report.other_bytes)


def _watch_engine(scope: Scope, receive: Receive) -> Receive:
    """`receive` of the application's lifespan, noting why it ends.

    vLLM stops the HTTP server both when it was told to and when its engine died, and exits with
    0 either way. Told to, it shuts the engine client down first.
    """

    async def watched() -> Message:
        global engine_died
        message = await receive()
        client: Any = scope["app"].state.engine_client
        if message["type"] == "lifespan.startup":
            _publish_metrics(_report(scope["app"]))
            shutdown = client.shutdown

            def note_shutdown(*args: Any, **kwargs: Any) -> Any:
                global _stopping
                _stopping = True
                return shutdown(*args, **kwargs)

            client.shutdown = note_shutdown
        elif message["type"] == "lifespan.shutdown":
            engine_died = bool(client.errored) and not _stopping
        return message

    return watched
