"""A running server, asked with the official client; and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import openai
import psutil
from helpers import tiny_llava
from helpers.server_process import Server, engine_of, environment, free_port, start_server
from transformers import AutoTokenizer

TOKENS = 8


def ask(client: openai.OpenAI, question: str = "What?", pictures: int = 1, **options: Any) -> Any:
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": tiny_llava.data_url(tiny_llava.picture(i))}}
        for i in range(pictures)
    ]
    content.append({"type": "text", "text": question})
    settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0} | options
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **settings
    )


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_smoke(server: Server, client: openai.OpenAI) -> None:
    """The server starts with no flag about quantization, and answers about a picture."""
    answer = ask(client, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS
    assert "w4a8, quantized with rtn" in server.output and "kernel" in server.output


def test_streaming_is_the_same_answer(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert "".join(pieces) == whole
    assert events[-1].usage.completion_tokens > 0


def test_several_pictures_and_one_too_many(client: openai.OpenAI) -> None:
    one, two = ask(client).usage.prompt_tokens, ask(client, pictures=2).usage.prompt_tokens
    assert two > one
    with pytest.raises(openai.BadRequestError, match="2"):
        ask(client, pictures=3)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"stop_token_ids": [10**9]}, {"structured_outputs": {"regex": "("}}],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_picture_after_a_request_about_it_was_refused(
    server: Server, wrong: dict[str, Any], stream: bool
) -> None:
    """vLLM took it for one that the engine has, and answered 500 or broke the stream off."""
    picture = tiny_llava.picture(100 + 10 * stream + len(str(wrong)))
    url = {"image_url": {"url": tiny_llava.data_url(picture)}}
    question = [{"type": "image_url", **url}, {"type": "text", "text": "What?"}]
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 2,
        "ignore_eos": True,
    }
    chat = f"{server.url}/v1/chat/completions"
    assert httpx.post(chat, json=body | wrong, timeout=60).status_code == 400
    answer = httpx.post(chat, json=body | {"stream": stream}, timeout=60)
    assert answer.status_code == 200 and '"finish_reason":"length"' in answer.text


@pytest.mark.parametrize(
    "part",
    [
        {"type": None, "image_url": {"url": "data:,"}},
        {"type": 3},
        {"type": "input_audio", "input_audio": 3},
        {"input_audio": 3},
    ],
    ids=["no-type", "a-number", "audio", "audio-without-type"],
)
def test_parts_that_hold_something_else(server: Server, part: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


DEAD = {
    "itself": {"json": {"$ref": "#"}},
    "each-other": {
        "json": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        }
    },
    "left-recursive": {"grammar": 'root ::= root "a"'},
    "rules-in-a-ring": {"grammar": "root ::= a\na ::= b\nb ::= a"},
    "dead-after-a-token": {"grammar": 'root ::= "a" dead\ndead ::= dead'},
    "no-character": {"grammar": "root ::= [^\\x00-\\U0010ffff]"},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dead", DEAD)
def test_a_schema_or_grammar_that_permits_no_answer(
    server: Server, dead: str, stream: bool
) -> None:
    """vLLM's engine gives the request up, and its front end answered 500."""
    settings = {"stream": stream, "max_tokens": 4, "structured_outputs": DEAD[dead]}
    for route, asked in (
        ("chat/completions", {"messages": [{"role": "user", "content": "What?"}]}),
        ("completions", {"prompt": "What?"}),
    ):
        answer = httpx.post(f"{server.url}/v1/{route}", json=settings | asked, timeout=60)
        assert answer.status_code == (200 if stream else 400), answer.text
        assert "a point where nothing may follow" in answer.text
        assert re.search(r'"code": ?400\b', answer.text)


def test_a_prompt_cut_into_its_picture(server: Server) -> None:
    url = {"image_url": {"url": tiny_llava.data_url(tiny_llava.picture(99))}}
    question = [{"type": "image_url", **url}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": question}], "truncate_prompt_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "no prompt can be made of the request" in answer.json()["error"]["message"]


def test_picture_decides_the_answer(client: openai.OpenAI) -> None:
    """Log-probabilities differ between two pictures: the vision tower is in use."""

    def first(seed: int) -> float:
        url = tiny_llava.data_url(tiny_llava.picture(seed))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=1,
            temperature=0,
            logprobs=True,
        )
        return float(answer.choices[0].logprobs.content[0].logprob)

    assert abs(first(1) - first(2)) > 1e-4


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    steps = answer.choices[0].logprobs.content
    assert len(steps) == answer.usage.completion_tokens
    for step in steps:
        assert len(step.top_logprobs) == 3
        assert step.logprob == max(top.logprob for top in step.top_logprobs)  # greedy


def test_structured_outputs(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = ask(
        client,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")
    choice = ask(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")
    regex = ask(client, extra_body={"structured_outputs": {"regex": "row [1-6] column [1-6]"}})
    assert re.fullmatch("row [1-6] column [1-6]", regex.choices[0].message.content)


@pytest.mark.slow
def test_tools(client: openai.OpenAI, checkpoint: Path) -> None:
    """A tool that is named, one that is required, and none; also as a stream."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    blank = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip()]
    asked = {"max_tokens": 100, "logit_bias": {str(i): -100 for i in blank}}  # else nothing else
    parameters = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    paint = {"name": "paint", "parameters": parameters, "strict": True}
    tools = [{"type": "function", "function": paint}]
    named = {"type": "function", "function": {"name": "paint"}}
    for choice in (named, "required"):
        answer = ask(client, tools=tools, tool_choice=choice, **asked)
        assert answer.choices[0].message.tool_calls, answer
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "paint"
        assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    events = ask(client, tools=tools, tool_choice=named, stream=True, **asked)
    deltas = [call for e in events if e.choices for call in e.choices[0].delta.tool_calls or []]
    pieces = [delta.function.arguments or "" for delta in deltas]
    assert json.loads("".join(pieces))["colour"] in ("red", "blue")
    for choice in ("auto", "none"):
        free = ask(client, tools=tools, tool_choice=choice).choices[0].message
        assert not free.tool_calls and free.content


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "how many", "max_tokens": 4}
    asked |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(**asked, logprobs=2)
    assert answer.usage.completion_tokens == 4
    assert all(len(top) >= 2 for top in answer.choices[0].logprobs.top_logprobs)
    events = client.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    url = tiny_llava.data_url(tiny_llava.picture())
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What?"},
    ]
    asked: dict[str, Any] = {"model": "tiny", "input": [{"role": "user", "content": content}]}
    asked |= {"max_output_tokens": TOKENS, "temperature": 0}
    answer = client.responses.create(**asked)
    assert answer.output_text == ask(client).choices[0].message.content
    events = list(client.responses.create(**asked, stream=True))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == answer.output_text
    assert client.responses.create(model="tiny", input="how many", max_output_tokens=4).output


def test_models_and_the_refusal_of_others(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        client.embeddings.create(model="tiny", input="x")


def test_tokenize_and_detokenize(server: Server) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "prompt": "how many"})
    ids = tokens.json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"model": "tiny", "tokens": ids})
    assert text.json()["prompt"].split() == ["how", "many"]
    messages = [{"role": "user", "content": "how many"}]
    chat = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "messages": messages})
    assert chat.json()["count"] > len(ids)


def test_version_health_and_metrics(server: Server, client: openai.OpenAI) -> None:
    ask(client)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "vllm:generation_tokens_total" in metrics
    (layers,) = (line for line in metrics.splitlines() if line.startswith("qig_layers{"))
    assert 'scheme="w4a8"' in layers and float(layers.split()[-1]) > 0
    assert 'qig_weight_bytes{part="quantized"' in metrics


def test_quantization_route(server: Server, checkpoint: Path) -> None:
    report = httpx.get(f"{server.url}/v1/quantization").json()
    assert (report["scheme"], report["method"], report["bits"]) == ("w4a8", "rtn", 4)
    assert report["calibration"]["sha256"] == "0" * 64
    names = {layer["name"] for layer in report["layers"]}
    assert "language_model.model.layers.0.self_attn.q_proj" in names
    assert sum(report["kernels"].values()) == len(names) and not any(
        layer["problem"] for layer in report["layers"]
    )


def test_doctor_and_the_log_say_the_same(server: Server, checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "doctor", checkpoint, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    report = httpx.get(f"{server.url}/v1/quantization").json()
    said = json.loads(done.stdout)
    for free in (said, report):  # memory that is free changes from moment to moment
        assert free["memory_bytes"].pop("device") > 0
    assert said.pop("loaded")["sound"] and said == report
    assert report["problems"] == [] and report["tensor_parallel_sizes"]
    for kernel, count in report["kernels"].items():
        assert f"{kernel}: {count} layers" in server.output
    for row in ("device", "vLLM", "tensor parallel", "memory needed"):
        assert f"\n{row:16}  " in server.output


def test_own_answers_have_vllms_cors_headers(server: Server) -> None:
    """A page of another origin reads 400 and our routes as it reads vLLM's."""

    def cors(answer: httpx.Response) -> dict[str, str]:
        return {k: v for k, v in answer.headers.items() if k.startswith("access-control")}

    page = {"Origin": "https://page.example"}
    wanted = cors(httpx.get(f"{server.url}/v1/models", headers=page))
    assert wanted["access-control-allow-origin"] == page["Origin"]
    for path in ("/", "/v1/quantization"):
        assert cors(httpx.get(server.url + path, headers=page)) == wanted
    refused = httpx.post(
        f"{server.url}/v1/completions", headers=page, content=rb'{"prompt": "\ud800"}'
    )
    assert refused.status_code == 400 and cors(refused) == wanted
    assert cors(httpx.get(f"{server.url}/")) == {}


def test_playground_page(server: Server) -> None:
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text and "https://" not in page.text  # works offline


def test_local_file_and_where_pictures_may_not_come_from(
    server: Server, client: openai.OpenAI
) -> None:
    tiny_llava.picture().save(server.media / "a.png")

    def about(url: str) -> Any:
        content: Any = [{"type": "image_url", "image_url": {"url": url}}]
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=2
        )

    assert about(f"file://{server.media}/a.png").choices
    for url in (
        "file:///etc/hostname",
        f"file://{server.media}/../server.log",
        f"file://{server.media}/none.png",
        "http://example.org/a.png",
        f"{server.url}/",
        "data:image/png;base64,AAAA",
    ):
        with pytest.raises(openai.BadRequestError):
            about(url)


def test_prompt_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        ask(client, "how many " * 400)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_lets_a_stream_finish(checkpoint: Path, tmp_path: Path, number: int) -> None:
    server = start_server(checkpoint, tmp_path)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    events = ask(client, max_tokens=300, stream=True, extra_body={"ignore_eos": True})
    next(events)
    stopped: list[int] = []
    stopper = threading.Thread(target=lambda: stopped.append(server.stop(number)))
    stopper.start()
    rest = list(events)
    assert rest[-1].choices[0].finish_reason == "length" and len(rest) > 200
    stopper.join()
    assert stopped == [0], server.output[-2000:]
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(checkpoint, tmp_path)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    next(ask(client, max_tokens=480, stream=True, extra_body={"ignore_eos": True}))
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert server.stop(signal.SIGINT) == 130, server.output[-2000:]
    assert server.output.endswith("qig-serve serve: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send", "says"),
    [(signal.SIGINT, os.killpg, "interrupted"), (signal.SIGTERM, os.kill, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_start_is_ended_at_once(
    checkpoint: Path, number: int, send: Callable[[int, int], None], says: str
) -> None:
    """Ctrl-C to all processes, as a terminal sends it; SIGTERM to one, as Docker does.

    Nothing is left of them, and no traceback.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "qig_serve", "serve", str(checkpoint), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        env=environment(),
    )
    engine: list[psutil.Process] = []
    while not engine and process.poll() is None:
        time.sleep(0.5)
        started = psutil.Process(process.pid).children(recursive=True)
        engine = [p for p in started if "EngineCore" in " ".join(p.cmdline())]
    send(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert output.endswith(f"qig-serve serve: {says}\n"), output[-2000:]
    assert "Traceback" not in output
    assert not psutil.wait_procs(engine, timeout=20)[1]


@pytest.mark.slow
def test_dead_engine_takes_the_process_down(checkpoint: Path, tmp_path: Path) -> None:
    server = start_server(checkpoint, tmp_path, "--api-key", "secret")
    health = f"{server.url}/health"
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    os.kill(engine_of(server.process.pid), signal.SIGKILL)
    red = False
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            red = red or httpx.get(health, timeout=5).status_code == 503
        except httpx.TransportError:
            break
        time.sleep(0.1)
    assert red
    assert server.process.wait(timeout=120) == 1, server.output[-2000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--trust-remote-code"], "is refused"), (["--trust-remote"], "is refused")],
    ids=["whole", "abbreviated"],
)
@pytest.mark.slow
def test_unsafe_flags_are_refused(checkpoint: Path, flags: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "serve", checkpoint, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 2 and message in done.stderr


def test_full_precision_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "serve", tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
    )
    assert done.returncode == 2 and "is not a qig checkpoint" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
