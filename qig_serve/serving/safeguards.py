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

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qig_serve.serving import media  # noqa: F401  registers the media connector in this process
from qig_serve.serving.engine_watch import THIS_PROCESS, EngineWatch
from qig_serve.serving.json_faults import find_fault
from qig_serve.serving.limits import Limits
from qig_serve.serving.request_faults import request_fault

HEALTH = "/health"
RETRY_AFTER_SECONDS = 5


class Safeguards:
    """API key on every route but health, body limit, bounded queue, `/` and `/v1/quantization`."""

    def __init__(self, app: ASGIApp, engine: EngineWatch = THIS_PROCESS) -> None:
        self.app = app
        self.engine = engine
        limits = Limits.from_environment()
        self.max_body = limits.max_body_mb << 20
        self.max_queued = limits.max_queued_requests
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "lifespan":
            await self.app(scope, self.engine.follow(scope, receive), send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == HEALTH and self.engine.stopping:  # a router is to turn to another server
            await _own(_busy("the server is stopping"), scope)(scope, receive, send)
            return
        if path == HEALTH or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        if not _authorize(scope):
            await _own(_reject_unauthorized(scope, path), scope)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            own = {"/": _page, "/v1/quantization": self._quantization}.get(path)
            await (_own(own(), scope) if own else self.app)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self._bounded(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body:
            await _own(self._too_large(), scope)(scope, receive, send)
            return
        if self.engine.stopping or self.running >= self.max_queued:
            reason = f"{self.running} requests are ahead"
            busy = _busy("the server is stopping" if self.engine.stopping else reason)
            await _own(busy, scope)(scope, receive, send)
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
            await _own(self._too_large(), scope)(scope, receive, send)
            return
        if fault := find_fault(body):
            invalid = _error(400, f"the request body is not valid: {fault}")
            await _own(invalid, scope)(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return unread.pop() if unread else await receive()

        answer = _HeldFault(send)
        try:
            await self.app(scope, read, answer.send)
        except Exception as error:
            fault = request_fault(error)
            if fault is None:
                await answer.release()
                raise
            await _own(_error(400, fault), scope)(scope, receive, send)
        else:
            await answer.release()

    def _too_large(self) -> Response:
        return _error(400, f"the request body is over {self.max_body >> 20} MiB (--max-body-mb)")

    def _quantization(self) -> Response:
        if self.engine.report is None:
            return _busy("the server is starting")
        return JSONResponse(self.engine.report)


def _own(answer: ASGIApp, scope: Scope) -> ASGIApp:
    """An answer of our own with the CORS headers that vLLM's answers carry.

    vLLM adds them further in, where an answer that is given here does not come by.
    """
    args = scope["app"].state.args
    return CORSMiddleware(
        answer,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )


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


def _error(status: int, message: str) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kinds = {400: "BadRequestError", 401: "AuthenticationError", 503: "ServiceUnavailableError"}
    error = {"message": message, "type": kinds[status], "param": None, "code": status}
    return JSONResponse({"error": error}, status)


def _busy(reason: str) -> JSONResponse:
    answer = _error(503, f"{reason}: try again later")
    answer.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return answer


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


def _page() -> Response:
    return HTMLResponse(_page_source(), headers={"Cache-Control": "no-store"})
