"""A server with a key, allowed domains and small limits, asked with the official client."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import openai
from helpers import tiny_llava
from helpers.picture_server import picture_server
from helpers.server_process import Server, start_server

pytestmark = pytest.mark.slow

KEY = "secret"
QUEUE = 3
PUBLIC = "93.184.216.34"
INTERNET = Path(__file__).parent.parent / "robustness" / "server" / "fake_internet"
NAMES = {"cdn.test": [[PUBLIC]], "other.test": [[PUBLIC]], "inside.test": [["10.0.0.1"]]}


@pytest.fixture(scope="module")
def web() -> Iterator[int]:
    """The port of a web server with a picture."""
    with picture_server() as port:
        yield port


@pytest.fixture(scope="module")
def guarded(
    checkpoint: Path, web: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    settings = {"names": NAMES, "public": [PUBLIC, web], "log": str(folder / "internet.log")}
    flags = ["--api-key", KEY, "--allowed-media-domains", "cdn.test", "inside.test"]
    flags += ["--max-body-mb", "1", "--max-image-pixels", "5000"]
    flags += ["--max-queued-requests", str(QUEUE)]
    with pytest.MonkeyPatch.context() as patch:
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(INTERNET), inherited])))
        patch.setenv("QIG_TEST_INTERNET", json.dumps(settings))
        started = start_server(checkpoint, folder, *flags)
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.fixture(scope="module")
def client(guarded: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)


def about(client: openai.OpenAI, url: str, **options: Any) -> Any:
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    settings = {"max_tokens": 4, "temperature": 0} | options
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **settings
    )


def test_picture_of_an_allowed_domain(client: openai.OpenAI, web: int) -> None:
    """The same log-probabilities as the picture in a data URL."""

    def steps(url: str) -> list[tuple[str, float]]:
        answer = about(client, url, logprobs=True, extra_body={"ignore_eos": True})
        return [(step.token, round(step.logprob, 4)) for step in answer.choices[0].logprobs.content]

    sent = tiny_llava.data_url(tiny_llava.picture())
    assert steps(f"http://cdn.test:{web}/a.png") == steps(sent)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://cdn.test:{}/there", "Failed to load image"),
        ("http://other.test:{}/a.png", "not an allowed media domain"),
        ("http://inside.test:{}/a.png", "inside.test resolves to 10.0.0.1, which is not a public"),
    ],
    ids=["redirect", "other-domain", "inside-address"],
)
def test_refused_remote_pictures(client: openai.OpenAI, web: int, url: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        about(client, url.format(web))


def test_large_pictures_and_bodies(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="100 x 100, more than the 5000 pixels"):
        about(client, tiny_llava.data_url(tiny_llava.picture(size=100)))
    with pytest.raises(openai.BadRequestError, match="over 1 MiB"):
        client.completions.create(model="tiny", prompt="x" * (1 << 20))


def test_key(guarded: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    for route in ("/", "/v1/quantization", "/metrics", "/version", "/docs", "/openapi.json"):
        assert httpx.get(guarded.url + route).status_code == 401, route
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_full_queue(guarded: Server, client: openai.OpenAI) -> None:
    """503 with Retry-After when the queue is full, while /health answers; and then room again."""
    url = tiny_llava.data_url(tiny_llava.picture())
    options = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
    streams = [about(client, url, **options) for _ in range(QUEUE)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.InternalServerError, match=f"{QUEUE} requests are ahead") as refused:
        about(client, url)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert all(len(list(stream)) > 100 for stream in streams)
    assert about(client, url).choices
