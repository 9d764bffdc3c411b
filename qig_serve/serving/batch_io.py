"""What goes into a batch and what comes out: OpenAI's JSONL, a folder of pictures, or CSV.

Input is read a line at a time and pictures when their request is sent, so a batch may be larger
than memory. A line that is no request becomes an error row with its number, not the end.

Output rows have OpenAI's form, and the line they answer:

    {"id": "batch_req_7", "custom_id": "a", "line": 7, "response": {"status_code": 200,
     "request_id": "...", "body": {...}}, "error": null}
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.records import picture_path, shown
from qig_serve.samples import IMAGE_SUFFIXES
from qig_serve.serving.json_faults import find_fault
from qig_serve.text_files import csv_columns, csv_rows, lines, parse_json, read_list

URL = "/v1/chat/completions"
_TURNS = ("messages", "input")  # the latter of /v1/responses


@dataclass(frozen=True)
class Request:
    """One request, or why its line is none (`error`)."""

    line: int
    custom_id: str | None
    url: str = URL
    body: dict[str, Any] | None = None
    error: str | None = None
    picture: str = ""
    """Its path, where the input is a folder and has no lines."""

    @property
    def place(self) -> str:
        """What a message about it begins with."""
        return self.picture or f"line {self.line}"


def read_requests(path: Path, prompt: str | None, body: dict[str, Any]) -> Iterator[Request]:
    """The requests of a JSONL or CSV file, or one for each picture of a folder.

    path: .jsonl in OpenAI's batch form; .csv with a column `image` and, unless `prompt` is given,
        `prompt`, and perhaps `custom_id`; or a folder of pictures.
    body: defaults for what a request does not say (model, max_tokens).
    UserError if the input cannot be read at all.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        requests = _from_folder(path, prompt)
    elif path.suffix.lower() == ".csv":
        requests = _from_csv(path, prompt)
    elif prompt is not None:
        raise UserError(
            f"{path}: --prompt is for a CSV file or a folder of pictures: the requests of JSONL "
            "say themselves what they ask"
        )
    elif read_list(path) is not None:
        raise UserError(f"{path} is one JSON list: write one request per line")
    else:
        requests = _from_jsonl(path)
    seen: set[str] = set()
    for request in requests:
        if request.custom_id in seen:  # without the id: a row's custom_id is one request's alone
            message = f"custom_id {request.custom_id!r} was used by an earlier line"
            yield Request(request.line, None, error=message)
            continue
        if request.custom_id is not None:
            seen.add(request.custom_id)
        if request.body is None:
            yield request
        else:
            yield replace(request, body=body | request.body)


def count_requests(path: Path) -> int:
    """How many requests `read_requests` gives, for the progress bar."""
    if path.is_dir():
        return len(_pictures(path))
    rows = csv_rows(path) if path.suffix.lower() == ".csv" else lines(path)
    return sum(1 for _ in rows)


def _from_jsonl(path: Path) -> Iterator[Request]:
    for number, text in lines(path):
        yield _parse_line(number, text)


def _parse_line(number: int, text: str) -> Request:
    try:
        line = parse_json(text)
    except RecursionError:
        return Request(number, None, error="not JSON: nested too deeply")
    except ValueError as error:
        return Request(number, None, error=f"not JSON: {error}")
    if not isinstance(line, dict):
        return Request(number, None, error=f"a JSON object is wanted, not {type(line).__name__}")
    if fault := find_fault(text.encode()):
        return Request(number, None, error=fault)
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        fault = "custom_id is missing or not a string"
        if "messages" in line:
            fault += ": write the messages into the body of a request, as OpenAI's batches have it"
        return Request(number, None, error=fault)
    url, body = line.get("url", URL), line.get("body")
    if line.get("method", "POST") != "POST":
        return Request(number, custom_id, error=f"method {line['method']!r}: only POST is known")
    if not isinstance(url, str) or not url.startswith("/v1/"):
        return Request(number, custom_id, error=f"url {url!r} does not start with /v1/")
    if not isinstance(body, dict):
        return Request(number, custom_id, error="body is missing or not an object")
    if body.get("stream"):
        return Request(number, custom_id, error="stream is not possible in a batch")
    return Request(number, custom_id, url, body)


def _pictures(folder: Path) -> list[Path]:
    """Those of a folder, hidden ones apart: macOS leaves ._NAME beside NAME."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts)
    )


def _from_folder(folder: Path, prompt: str | None) -> Iterator[Request]:
    if prompt is None:
        raise UserError(f"{folder} is a folder of pictures: say what to ask with --prompt")
    pictures = _pictures(folder)
    if not pictures:
        raise UserError(f"{folder}: no pictures there ({', '.join(IMAGE_SUFFIXES)})")
    for number, picture in enumerate(pictures, 1):
        name = picture.relative_to(folder).as_posix()
        yield Request(number, name, body=_question(name, prompt), picture=name)


def _from_csv(path: Path, prompt: str | None) -> Iterator[Request]:
    columns = csv_columns(path)
    needed = ["image"] if prompt else ["image", "prompt"]
    if missing := [column for column in needed if column not in columns]:
        raise UserError(f"{path}: its first line has no column {' and no '.join(missing)}")
    for row in csv_rows(path):
        custom_id = row.fields.get("custom_id") or str(row.line)
        question = row.fields.get("prompt") or prompt
        if row.surplus:
            error = f"{row.surplus[0]!r} belongs to no column: quote fields that have commas"
            yield Request(row.line, custom_id, error=error)
        elif not question or not row.fields["image"]:
            yield Request(row.line, custom_id, error="image or prompt is empty")
        else:
            yield Request(row.line, custom_id, body=_question(row.fields["image"], question))


def _question(image: str, prompt: str) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": prompt},
    ]
    return {"messages": [{"role": "user", "content": content}]}


def body_to_send(
    request: Request, folder: Path, names: dict[str, str] | None = None
) -> dict[str, Any]:
    """The body of a request, its pictures embedded (`embed_pictures`).

    ValueError, with a sentence, if its line is no request, or a picture cannot be read.
    """
    if request.body is None:
        raise ValueError(request.error or "not a request")
    return embed_pictures(request.body, folder, names)


def embed_pictures(
    body: dict[str, Any], folder: Path, names: dict[str, str] | None = None
) -> dict[str, Any]:
    """`body` with pictures named by path (relative to `folder`) as data URLs; others as they are.

    names: is filled with data URL -> name of its file.
    ValueError, with a sentence, if one cannot be read.
    """
    names = {} if names is None else names
    lists = {key: body[key] for key in _TURNS if isinstance(body.get(key), list)}
    return body | {k: [_embed_message(m, folder, names) for m in v] for k, v in lists.items()}


def _embed_message(message: Any, folder: Path, names: dict[str, str]) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [_embed_part(part, folder, names) for part in message["content"]]
    return message | {"content": parts}


def _embed_part(part: Any, folder: Path, names: dict[str, str]) -> Any:
    image = part.get("image_url") if isinstance(part, dict) else None
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        return part
    path = picture_path(url, folder)
    if url[:5].lower() == "data:":
        embedded = "".join(url.split())  # some programs break long base64 into lines
    elif path is None:  # on a network: the server says whether it may
        return part
    elif os.path.lexists(path) and not os.path.isfile(path):  # a device might have no end
        raise ValueError(f"cannot read the picture {shown(path)}: it is no file")
    else:
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"cannot read the picture {shown(path)}: {reason}") from None
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        embedded = f"data:{kind};base64,{data}"
        names[embedded] = shown(path)
    return part | {"image_url": image | {"url": embedded} if isinstance(image, dict) else embedded}


def result_row(
    request: Request, status: int, request_id: str, body: Any, picture: str = ""
) -> dict[str, Any]:
    """The output row of an answered request.

    picture: the file that the answer, an error, is about.
    """
    error = None
    if status != 200:
        inner = body.get("error", body) if isinstance(body, dict) else body
        message = inner.get("message") if isinstance(inner, dict) else inner
        if not message:  # of the router, before vLLM
            message = f"POST {request.url} is answered with {status} {_phrase(status)}"
        place = f"{request.place}: {picture}" if picture else request.place
        error = {"code": str(status), "message": f"{place}: {message}"}
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "line": request.line,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": error,
    }


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def error_row(request: Request, message: str) -> dict[str, Any]:
    """The output row of a line that was not sent."""
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "line": request.line,
        "response": None,
        "error": {"code": "invalid_line", "message": f"{request.place}: {message}"},
    }


def _answer_body(row: dict[str, Any]) -> dict[str, Any]:
    body = row["response"]["body"] if row["response"] else None
    return body if isinstance(body, dict) else {}


def answer_text(row: dict[str, Any]) -> str:
    """The answer's text; of several choices a JSON list, of tool calls their JSON."""
    body = _answer_body(row)
    choices = [_choice_text(choice) for choice in body.get("choices") or ()]
    if len(choices) > 1:
        return json.dumps(choices, ensure_ascii=False)
    parts = body.get("content") or [  # of /v1/messages, or else of /v1/responses
        part for item in body.get("output") or () for part in item.get("content") or ()
    ]
    return choices[0] if choices else "".join(part.get("text") or "" for part in parts)


def _choice_text(choice: dict[str, Any]) -> str:
    message = choice.get("message") or {}
    text = message.get("content") or choice.get("text") or ""
    calls = message.get("tool_calls")
    return text or (json.dumps(calls, ensure_ascii=False) if calls else "")


def completion_tokens(row: dict[str, Any]) -> int:
    """How many tokens were generated for the row."""
    usage = _answer_body(row).get("usage") or {}
    return usage.get("completion_tokens") or usage.get("output_tokens") or 0
