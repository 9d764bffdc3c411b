"""Every field of the two endpoints with values that no one should send; and no bodies at all."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from helpers.server_process import Server
from requests_to import CHAT, COMPLETIONS, ROUTES, Tally, assert_still_right, plain_body

pytestmark = pytest.mark.slow

Request = tuple[str, dict[str, Any] | tuple[str, bytes]]
"""Route; and the body as an object, or its content type and bytes."""

DEEP: Any = json.loads("[" * 200 + "]" * 200)
SCHEMA_BOMB = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2,
    65,
    20_000,
    2**31,
    2**63,
    -(2**63) - 1,
    10**40,
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "a",
    "1",
    "nan",
    "\x00",
    "\ud800",
    "é" * 3000,
    "{{ 1/0 }}",
    "{% for",
    "(((",
    [],
    [None],
    [""],
    ["a"],
    [0],
    [-1],
    [10**12],
    [2**64],
    [1.5],
    [[]],
    [{}],
    [float("nan")],
    DEEP,
    {},
    {"a": 1},
    {"0": 1e308},
    {"-1": 1},
    {"999999999": 1},
    {"0": float("nan")},
    {"type": "json_object"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA_BOMB}},
    {"type": "structural_tag", "format": {"type": "?"}},
    {"regex": "("},
    {"regex": "a{1000000}"},
    {"regex": "(?=a)b"},
    {"grammar": "root ::= "},
    {"grammar": "\x00"},
    {"choice": []},
    {"choice": ["", ""]},
    {"json": "{"},
    {"json": {"$ref": "http://127.0.0.1:9/a"}},
    {"json": {"type": "string", "pattern": "("}},
    {"json_object": True, "regex": "a"},
    {"image": {"rgba_background_color": "red"}},
    {"image": {"image_mode": "nothing"}},
    {"include_usage": "maybe"},
]
MESSAGES: list[Any] = [
    [{}],
    [{"role": "nobody", "content": "a"}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": {}}],
    [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": ["a", 1]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"type": "nothing", "nothing": "a"}]}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": None}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}],
    [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}],
    [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": {"a": "AAAA"}}]}],
    [{"role": "user", "content": [{"type": "image_pil", "image_pil": "AAAA"}]}],
    [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "data:,a"}}]}],
    [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,a"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA"}}]}],
    [{"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]}],
    [{"role": "user", "content": "<image>"}],
    [{"role": "user", "content": "<image>" * 600}],
    [{"role": "user", "content": "\x00\ufffe\U0010ffff"}],
    [{"role": "user", "content": "\ud83d"}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    [
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
            ],
        }
    ],
    [{"role": "tool", "content": "a"}],
    [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
    [{"role": "user", "content": "a"}] * 3000,
]
PROMPTS: list[Any] = [
    [[0, -1]],
    [[10**9]],
    [2**40],
    ["a"] * 1025,
    ["a", [0]],
    [["a"]],
    "<image>",
    [1] * 600,
    {"prompt": "a"},
]
TOGETHER: list[dict[str, Any]] = [
    {"n": 100, "temperature": 1},
    {"n": 16384, "temperature": 1},
    {"best_of": 3},
    {"use_beam_search": True, "n": 3},
    {"use_beam_search": True, "n": 0},
    {"use_beam_search": True, "n": 3, "length_penalty": float("nan")},
    {"use_beam_search": True, "stream": True},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": False, "stream_options": {"include_usage": True}},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "top_logprobs": -1},
    {"logprobs": 5, "echo": True, "max_tokens": 0},
    {"prompt_logprobs": 3},
    {"prompt_logprobs": -1, "stream": True},
    {"echo": True, "suffix": "a"},
    {"min_tokens": 5, "max_tokens": 2},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"continue_final_message": True, "add_generation_prompt": False},
    {"tools": [], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "absent"}}},
    {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    {"kv_transfer_params": {"do_remote_prefill": True}},
    {"kv_transfer_params": {"do_remote_decode": True, "remote_host": 1}},
    {"ec_transfer_params": {"a": 1}},
    {"allowed_token_ids": [0], "stop_token_ids": [0]},
    {"bad_words": ["a"] * 200},
    {"cache_salt": "a", "priority": 3},
    {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1},
    {"repetition_detection": {"max_pattern_size": 3, "min_count": 1}},
    {"mm_processor_kwargs": {"size": {"height": 100_000, "width": 100_000}}},
    {"chat_template": "{{ messages.__class__.__mro__ }}"},
    {"chat_template": "{% for i in range(10**9) %}a{% endfor %}"},
    {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}a{% endfor %}"}},
    {"chat_template_kwargs": {"messages": [], "tokenize": False}},
    {"documents": [{"title": "a"}], "reasoning_effort": "max"},
    {"vllm_xargs": {"a": 2**64}},
    {"thinking_token_budget": 5},
    {"request_id": "\n"},
    {"request_id": "a" * 100_000},
    {"prompt_embeds": "AAAA"},
    {"prompt_embeds": ["AAAA", 3]},
    {"data_parallel_rank": 5},
]
RAW: list[tuple[str, bytes]] = [
    ("application/json", raw)
    for raw in (
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"a"',
        b"\xff\xfe{",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "model": 3}',
        b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
        b"{" + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
    )
]
RAW += [
    (kind, b'{"model": "tiny", "prompt": "a", "max_tokens": 1}')
    for kind in (
        "text/plain",
        "multipart/form-data",
        "application/json; charset=utf-16",
        "application/x-www-form-urlencoded",
        "",
        "\x7f",
    )
]


def send_all(server: Server, requests: list[Request]) -> Tally:
    """Send them eight at a time."""
    tally = Tally()
    with (
        httpx.Client(base_url=server.url, timeout=200) as http,
        ThreadPoolExecutor(8) as pool,
    ):

        def send(request: Request) -> None:
            route, body = request
            if isinstance(body, tuple):
                kind, raw = body
                headers = {"Content-Type": kind}
                answer = http.post(route, content=raw, headers=headers)
            else:  # json.dumps writes NaN and lone surrogates, which httpx refuses to
                raw = json.dumps(body).encode()
                answer = http.post(route, content=raw, headers={"Content-Type": "application/json"})
            odd = body if isinstance(body, tuple) else differing(route, body)
            tally.note((route, odd), answer.status_code, answer.text)

        list(pool.map(send, requests))
    print(f"\n{tally}")
    return tally


def differing(route: str, body: dict[str, Any]) -> dict[str, Any]:
    """What is odd about the body."""
    plain = plain_body(route)
    return {k: v for k, v in body.items() if k not in plain or plain[k] != v}


def check(server: Server, tally: Tally) -> None:
    assert not tally.faults, f"{tally}\n" + "\n".join(tally.faults[:40])
    assert_still_right(server.url)


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_with_every_odd_value(server: Server, route: str) -> None:
    name = {CHAT: "ChatCompletionRequest", COMPLETIONS: "CompletionRequest"}[route]
    document = httpx.get(f"{server.url}/openapi.json", timeout=30).json()
    fields = document["components"]["schemas"][name]["properties"]
    assert len(fields) > 50
    requests: list[Any] = [
        (route, plain_body(route) | {field: value}) for field in fields for value in VALUES
    ]
    check(server, send_all(server, requests))


def test_odd_messages_prompts_and_combinations(server: Server) -> None:
    requests: list[Any] = [(CHAT, plain_body(CHAT) | {"messages": m}) for m in MESSAGES]
    requests += [(COMPLETIONS, plain_body(COMPLETIONS) | {"prompt": p}) for p in PROMPTS]
    requests += [(route, plain_body(route) | more) for route in ROUTES for more in TOGETHER]
    check(server, send_all(server, requests))


def test_bodies_that_are_none(server: Server) -> None:
    check(server, send_all(server, [(route, raw) for route in ROUTES for raw in RAW]))


JSON = {"Content-Type": "application/json"}


def test_body_over_the_limit(server: Server) -> None:
    """With a length and without; the limit is 4 MiB here."""
    plain = json.dumps(plain_body(CHAT)).encode()
    body = plain + b" " * (4 << 20)  # blanks: vLLM has limits of its own for fields

    def pieces() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, pieces()):
        answer = httpx.post(server.url + CHAT, content=content, headers=JSON, timeout=60)
        assert answer.status_code == 400 and "over 4 MiB" in answer.text
    fits = plain + b" " * ((4 << 20) - len(plain))
    answer = httpx.post(server.url + CHAT, content=fits, headers=JSON, timeout=60)
    assert answer.status_code == 200, answer.text
    assert_still_right(server.url)
