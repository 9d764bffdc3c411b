"""Many clients at once, each answer kept with how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

CLIENTS = 50
REQUESTS = 100


@dataclass(frozen=True)
class Answer:
    """What a client got: the text so far, whether it is all, and else why not."""

    question: int
    text: str
    whole: bool
    error: str = ""


def ask(url: str, key: str, number: int, bodies: list[dict[str, Any]], stream: bool) -> Answer:
    """One request of the official client, which does not try again."""
    import httpx
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)
    question = number % len(bodies)
    text, whole = "", False
    try:
        if not stream:
            choice = client.chat.completions.create(**bodies[question]).choices[0]
            return Answer(question, choice.message.content or "", choice.finish_reason is not None)
        for event in client.chat.completions.create(**bodies[question], stream=True):
            for choice in event.choices:
                text += choice.delta.content or ""
                whole = whole or choice.finish_reason is not None
    except (openai.APIError, httpx.TransportError) as error:
        return Answer(question, text, False, f"{type(error).__name__}: {error}")
    return Answer(question, text, whole, "" if whole else "ended early")


def under_load(
    url: str, key: str, bodies: list[dict[str, Any]], act: Callable[[], Any] = lambda: None
) -> tuple[list[Answer], Any]:
    """100 requests of 50 clients, every other one streaming; `act()` when a fifth is answered.

    Returns the answers, and what `act` returned.
    """
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked: list[Future[Answer]] = [
            pool.submit(ask, url, key, i, bodies, i % 2 == 0) for i in range(REQUESTS)
        ]
        while sum(f.done() for f in asked) < REQUESTS // 5:
            time.sleep(0.05)
        acted = act()
        return [f.result() for f in asked], acted


def assert_right(answers: list[Answer], alone: list[str]) -> None:
    """All of them are whole, and those of a quiet server."""
    for answer in answers:
        assert answer.whole, answer
        assert answer.text == alone[answer.question]


def assert_none_wrong(answers: list[Answer], alone: list[str]) -> None:
    """What is whole is right; what is not says so, and is the beginning of it."""
    assert_right([answer for answer in answers if answer.whole], alone)
    cut = [answer for answer in answers if not answer.whole]
    for answer in cut:
        assert alone[answer.question].startswith(answer.text) and answer.error, answer
    said = sorted({answer.error[:150] for answer in cut})
    print(f"\n{len(answers) - len(cut)} whole, {len(cut)} cut: {said}")
