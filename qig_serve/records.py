"""Samples from people's files: JSON lines, or one JSON list of the same records.

A record's turns are "messages" (OpenAI's chat form, samples.py), "conversations" (LLaVA, ShareGPT,
LLaMA-Factory), or what turns.py makes one of these. Which form a file is in, its first character
says, not its name. Whatever carries a picture, a sound, a tool or a thought is read or refused with
its line; nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from qig_serve.errors import UserError
from qig_serve.samples import ImageSource, Sample
from qig_serve.text_files import lines, parse_json, read_list
from qig_serve.turns import check_beside, is_rejected, with_turns

_ROLES = ("system", "user", "assistant")
_SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in _ROLES}
"""Those of conversations, and their roles."""
_MEDIA = re.compile(
    r"(input_)?(image|img|picture|photo|video|audio|sound|speech|media)s?"
    r"(_?(url|uri|path|file|byte|data|base64|b64)s?)?"
    r"|pixel_values|multi_?modal(_data)?"
)
"""Keys, in small letters, that carry pictures, video or sound in somebody's data."""
_MEDIA_VALUE = re.compile(
    r"data:(image|video|audio)/.*|.{1,4096}\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic"
    r"|mp4|mkv|avi|mov|webm|wav|mp3|flac|ogg|m4a)",
    re.IGNORECASE | re.DOTALL,
)
"""Texts that name such a file."""
_TEXTS = frozenset({"id", "type", "answer", "messages", "conversations", "system"})
"""Keys of a record that may speak of files."""
_NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that a model says as text of its own form."""
_TOOLS = ("tools", "functions")
_PICTURE_PARTS = ("image", "image_url", "input_image", None)
PICTURE_KEYS = ("image_url", "image", "url", "path")
"""Types of a part that holds a picture, and where: OpenAI's, vLLM's, transformers', Qwen's."""
_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Keys by which Qwen's own code scales one picture."""
_SHOWN = 300  # characters of a name


class MissingPicture(UserError):
    """A picture whose file is not there."""


def read_samples(path: Path, n: int | None = None, scored: bool = False) -> list[Sample]:
    """The first `n` samples of a file; with `scored`, of those that have an answer.

    UserError, with the number of the line or record, for anything that is not a sample, for a
    missing picture, and when nothing is left.
    """
    samples: list[Sample] = []
    unscored = 0
    for where, number, record in records(path):
        if n is not None and len(samples) >= n:
            break
        sample = parse_record(record, where, path.parent, number)
        if scored and not (sample.answer or "").strip():
            unscored += 1
            continue
        samples.append(sample)
    if not samples:
        if unscored:
            raise UserError(f"{path}: no line has an answer, so there is nothing to score")
        raise UserError(f"{path} holds no samples: it needs one JSON object per line, or a list")
    return samples


def records(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Of each record of a file: its place for messages, its number, its value."""
    if str(path).startswith("hf:"):
        raise UserError(f"{path}: datasets are for calibration: write the questions as JSON lines")
    if not path.is_file():
        fault = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"the sample file {path} {fault}")
    values = read_list(path)
    if values is not None:
        for index, value in enumerate(values):
            yield f"{path}, record {index}", index, value
        return
    for number, line in lines(path):
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: not JSON ({error}): write one sample per line, or one list of them"
            ) from None
        yield where, number, value


_Pictures = Sequence[ImageSource] | None


def parse_record(
    record: Any, where: str, folder: Path, number: int, pictures: _Pictures = None
) -> Sample:
    """A sample from the value of its JSON; `number` names it if it has no id.

    Pictures are parts of the messages, or paths in "images" beside them, which take the places of
    the marks `<image>` in the texts (LLaMA-Factory) or of parts without a path (TRL). Those of
    conversations may be "image" as well, and stand before the first question without a mark.
    `pictures`: those of a dataset's row, whose columns hold pictures instead of paths; without a
    mark they stand before the first question, as TRL has it.
    """
    if is_rejected(record):
        raise UserError(
            f"{where}: its answer is marked as one that is not wanted (label or kto_tag is "
            "false): leave the line out"
        )
    if isinstance(record, dict):
        record = with_turns(record, where)
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if record.get("conversations"):
            raise UserError(
                f'{where}: "messages" and "conversations": give the turns in one of them'
            )
        return _from_messages(record, where, folder, number, pictures)
    if isinstance(record, dict) and isinstance(record.get("conversations"), list):
        return _from_conversations(record, where, folder, number, pictures)
    raise UserError(
        f'{where}: a sample needs a "messages" list in OpenAI chat form, a list of '
        '"conversations" as LLaVA has it, "prompt" with "completion" or "chosen" as TRL has them, '
        'or "texts" of questions and answers as The Cauldron has them'
    )


def _from_messages(
    record: dict[str, Any], where: str, folder: Path, number: int, pictures: _Pictures
) -> Sample:
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f'{where}: "answer" must be text, not {type(answer).__name__}')
    check_media(record, where, read=("images",))
    images = _beside(record, where, folder) or None if pictures is None else list(pictures)
    count = len(images or ())
    messages = [_parse_message(m, where, folder, images) for m in record["messages"]]
    if images and pictures is None:
        raise _unequal(where, count, count - len(images))
    _place_unmarked(messages, images or [], count, where)
    return _sample(record, messages, where, number, "all", answer)


def _from_conversations(
    record: dict[str, Any], where: str, folder: Path, number: int, pictures: _Pictures
) -> Sample:
    """[{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a star"}]."""
    check_media(record, where, read=("image", "images"))
    images = _beside(record, where, folder) if pictures is None else list(pictures)
    count = len(images)
    messages = []
    for turn in record["conversations"]:
        said = turn if isinstance(turn, dict) else {}
        speaker, value = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if str(speaker) not in _SPEAKERS or not isinstance(value, str):
            raise UserError(f'{where}: a turn needs "from" (human or gpt) and "value"')
        message = {**said, "role": _SPEAKERS[str(speaker)], "content": value}
        messages.append(_parse_message(message, where, folder, images))
    _place_unmarked(messages, images, count, where)
    return _sample(record, messages, where, number, "conversation", None)


def _place_unmarked(
    messages: list[dict[str, Any]], images: list[ImageSource], count: int, where: str
) -> None:
    """Puts pictures before the first question where none of the `count` has a mark."""
    if 0 < len(images) < count:
        raise _unequal(where, count, count - len(images))
    first = next((m for m in messages if m["role"] == "user"), None)
    if first is not None:  # _sample refuses a conversation without one
        first["content"][:0] = [{"type": "image", "image": image} for image in images]


def _sample(
    record: dict[str, Any],
    messages: list[dict[str, Any]],
    where: str,
    number: int,
    kind: str,
    answer: str | None,
) -> Sample:
    """The sample of a record's turns: a last one of the assistant is the answer, if none is given.

    So an answer is never a prompt.
    """
    if any(key for key in _TOOLS if record.get(key) not in (None, "", "[]", [])):
        raise UserError(
            f"{where}: definitions of tools are not read: write them into the system turn, as the "
            "model does"
        )
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise UserError(f'{where}: "system" must be text, not {type(system).__name__}')
    if system.strip():
        if messages and messages[0]["role"] == "system":
            raise UserError(f'{where}: "system" and a system turn: give one of them')
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    if not any(p["type"] == "image" for m in messages for p in m["content"]):
        check_files(record, where)
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        said = messages.pop()["content"]
        if any(part["type"] == "image" for part in said):
            raise UserError(f"{where}: the answer holds a picture, and models answer in text")
        answer = "".join(part["text"] for part in said) if answer is None else answer
    if not any(m["role"] == "user" for m in messages):
        raise UserError(f"{where}: the conversation has no user turn")
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: the turn before the answer must be the user's")
    if not any(p["type"] == "image" or p["text"].strip() for p in messages[-1]["content"]):
        raise UserError(f"{where}: the last user turn is empty")
    check_beside(record, messages, answer, where)
    named, typed = record.get("id"), record.get("type")
    return Sample(
        str(number if named is None else named),
        kind if typed is None else str(typed),
        tuple(messages),
        answer,
    )


def check_media(record: dict[str, Any], where: str, read: Sequence[str] = ()) -> None:
    """UserError for a key that carries pictures, video or sound and would not be read."""
    for key in sorted(set(record) - set(read)):
        if record[key] and _MEDIA.fullmatch(key.lower()):
            raise _not_read(where, key)


def check_files(record: dict[str, Any], where: str) -> None:
    """UserError where the record of a sample without pictures names one, under whatever key."""
    for key in sorted(set(record) - _TEXTS):
        if _names_media(record[key]):
            raise _not_read(where, key)


def _names_media(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str):
        return bool(_MEDIA_VALUE.fullmatch(value))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 3 and any(_names_media(item, depth + 1) for item in inner)


def _not_read(where: str, key: str) -> UserError:
    return UserError(
        f'{where}: the key "{key}" is not read: give pictures as image_url parts of a '
        'message, or as paths in "images" with <image> in the text; video and sound cannot '
        "be used"
    )


def _unequal(where: str, images: int, marks: int) -> UserError:
    return UserError(f"{where}: {images} images, and {marks} marks <image> in the messages")


def _beside(record: dict[str, Any], where: str, folder: Path) -> list[ImageSource]:
    """The pictures that stand beside the turns; none where the record has none."""
    if record.get("image") and record.get("images"):
        raise UserError(f'{where}: "image" and "images": give the pictures in one of them')
    key = "image" if record.get("image") else "images"
    value = record.get(key) or []
    named = value if isinstance(value, list) else [value]
    if not all(isinstance(url, str) for url in named):
        raise UserError(f'{where}: "{key}" must be a list of paths')
    return [resolve_picture(url, where, folder) for url in named]


def _split_marks(text: str, images: list[ImageSource], where: str) -> list[dict[str, Any]]:
    """Parts of a text in which each `<image>` stands for the next of `images`, which it takes."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split("<image>")):
        if i:
            if not images:
                raise UserError(f"{where}: more <image> marks than images")
            parts.append({"type": "image", "image": images.pop(0)})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _parse_message(
    message: Any, where: str, folder: Path, images: list[ImageSource] | None
) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise UserError(f"{where}: every message needs a role, one of {', '.join(_ROLES)}")
    check_media(message, where)
    if key := next((key for key in _NOT_TEXT if message.get(key)), None):
        raise UserError(
            f'{where}: "{key}" of a message is not read (calls of tools, thoughts): write it into '
            "the text, as the model does"
        )
    content = message.get("content")
    if isinstance(content, str) and images is not None:
        return {"role": message["role"], "content": _split_marks(content, images, where)}
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(f"{where}: the content of a message must be text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type", "") if isinstance(part, dict) else ""
        if kind in ("text", "input_text"):
            check_media(part, where)
        elif kind and part.get("text"):
            raise UserError(f"{where}: a part of type {kind!r} holds a text too: make them two")
        if images is not None and kind == "text" and isinstance(part.get("text"), str):
            parts += _split_marks(part["text"], images, where)
        elif images is not None and kind == "image" and not _picture_urls(part):
            parts += _split_marks("<image>", images, where)
        else:
            parts.append(_parse_part(part, where, folder))
    return {"role": message["role"], "content": parts}


def _picture_urls(part: dict[str, Any]) -> list[Any]:
    return [part[key] for key in PICTURE_KEYS if part.get(key)]


def _parse_part(part: Any, where: str, folder: Path) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else ""
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    urls = _picture_urls(part) if kind in _PICTURE_PARTS else []
    if urls and (key := next((key for key in _SIZES if part.get(key) is not None), None)):
        raise UserError(
            f'{where}: "{key}" of a picture is not read, and requests have no such key: scale the '
            "picture, or set the size in preprocessor_config.json"
        )
    if len(urls) == 1:
        url = urls[0].get("url") if isinstance(urls[0], dict) else urls[0]
        if isinstance(url, str):
            return {"type": "image", "image": resolve_picture(url, where, folder)}
        if isinstance(url, (bytes, Image.Image)):  # of a dataset's row
            return {"type": "image", "image": url}
    raise UserError(
        f"{where}: a part must be {{'type': 'text', 'text': ...}} or "
        "{'type': 'image_url', 'image_url': {'url': ...}}"
    )


def resolve_picture(url: str, where: str, folder: Path) -> ImageSource:
    """The picture that a path, a file:// URL or a data URL means; UserError, from `where` on."""
    if url[:5].lower() == "data:":
        try:
            # Some programs break long base64 into lines.
            data = base64.b64decode("".join(url.partition(",")[2].split()), validate=True)
        except ValueError:
            raise UserError(f"{where}: the data URL is not valid base64") from None
        if not data:
            raise UserError(f"{where}: the data URL holds no image")
        return data
    if not url.strip():
        raise UserError(f"{where}: the path of an image is empty")
    path = picture_path(url, folder)
    if path is None:
        raise UserError(f"{where}: {shown(url)} is on a network; give a file path or a data URL")
    if not os.path.isfile(path):
        if os.path.lexists(path):
            raise UserError(f"{where}: the image {shown(path)} is no file")
        raise MissingPicture(f"{where}: the image {shown(path)} does not exist")
    return path


def shown(name: str | Path) -> str:
    """A name from somebody's file for a message: on one line, and not longer than that."""
    text = str(name)[:_SHOWN]
    return text if text.isprintable() else repr(text)


def picture_path(url: str, folder: Path) -> Path | None:
    """The file that a path or a file:// URL means, relative ones from `folder`; None for others.

    The same in samples and in batches.
    """
    if url[:7].lower() == "file://":
        return folder / unquote(url[7:].removeprefix("localhost"))
    return None if "://" in url else folder / url
