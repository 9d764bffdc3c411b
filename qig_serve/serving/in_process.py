"""One request to vLLM's server application in this process: what HTTP costs is left out.

On the demonstration model a general client (httpx over its ASGI transport) and the server's
middlewares took a third of the front end's time per request; routing, validation and JSON of the
application itself a quarter of what was left.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

Chat = Callable[[dict[str, Any], str], Awaitable[dict[str, Any] | None]]
"""(body, request id) -> the whole answer of a chat completion; None: ask the application."""


def chat_of(handler: Any) -> Chat:
    """Chat completions by vLLM's own handler (`app.state.openai_serving_chat`).

    Only whole answers come from it. Whatever else a body leads to, an error or a stream, is the
    application's, which knows how to say it.
    """
    from qig_serve.vllm_plugin import compat

    request_type, answer_type = compat.chat_request(), compat.chat_response()
    wrong_body = (ValueError, compat.validation_error())

    async def chat(body: dict[str, Any], request_id: str) -> dict[str, Any] | None:
        try:
            request = request_type.model_validate(body)
            request.request_id = request_id
            answer = await handler.create_chat_completion(request)
            return answer.model_dump(mode="json") if isinstance(answer, answer_type) else None
        except wrong_body:  # as the application says
            return None
        except Exception as error:  # the application meets it again, and answers it
            warnings.warn(
                f"vLLM's chat handler failed ({type(error).__name__}); such requests go through "
                "the application, which answers them, and takes longer",
                RuntimeWarning,
                stacklevel=1,
            )
            return None

    return chat


async def post(app: Any, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
    """(status, body) of the answer to a POST of JSON.

    app: ASGI 3 application. What it raises is raised here, unless it answered with 5xx first
    (Starlette answers 500, then raises again).
    """
    headers = {"content-type": "application/json", "x-request-id": request_id}
    headers["content-length"] = str(len(body))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": ("batch", None),
    }
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    answered = asyncio.Event()
    status: int | None = None
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await answered.wait()  # a client that has gone away would stop the request
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception as error:
        from qig_serve.serving.request_faults import request_fault

        if (fault := request_fault(error)) is not None:
            return 400, json.dumps({"error": {"message": fault, "code": 400}}).encode()
        if status is None or status < 500:
            raise
    finally:
        answered.set()
    if status is None:
        raise RuntimeError(f"POST {path}: the application did not answer")
    return status, b"".join(parts)
