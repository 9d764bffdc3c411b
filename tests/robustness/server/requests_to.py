"""Requests that the tests of a server's robustness share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROUTES = (CHAT, COMPLETIONS)


def plain_body(route: str) -> dict[str, Any]:
    """A request that the server answers."""
    question = {"messages": [{"role": "user", "content": "what?"}]}
    body = question if route == CHAT else {"prompt": "what?"}
    return body | {"model": "tiny", "max_tokens": 2, "temperature": 0}


def picture_body(url: Any, *more: Any) -> dict[str, Any]:
    """A question about the pictures at these URLs."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": u}} for u in (url, *more)]
    content.append({"type": "text", "text": "what?"})
    return plain_body(CHAT) | {"messages": [{"role": "user", "content": content}]}


def is_fault(status: int) -> bool:
    """Whether the server blames itself; 503 is how the bounded queue says no."""
    return status >= 500 and status != 503


class Tally:
    """What was sent and how it was answered; faults are kept whole."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []

    def note(self, what: object, status: int, answer: str) -> None:
        """Count an answer."""
        self.statuses[status] += 1
        if is_fault(status):
            self.faults.append(f"{status} for {str(what)[:600]}\n  {answer[:600]}")

    def __str__(self) -> str:
        counts = ", ".join(f"{n} x {status}" for status, n in sorted(self.statuses.items()))
        return f"{self.statuses.total()} requests: {counts}"


def assert_still_right(url: str) -> None:
    """The server answers as it should, and says that it is well."""
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200
    for route in ROUTES:
        answer = httpx.post(url + route, json=plain_body(route), timeout=60)
        assert answer.status_code == 200, answer.text
