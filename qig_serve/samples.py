"""Samples: the one JSON line that calibration and evaluation both read.

    {"id": "7", "type": "count", "answer": "3", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "images/7.png"}},
        {"type": "text", "text": "How many stars are there?"}]}]}

Image paths are relative to the file; data URLs are allowed; nothing is fetched from a network.
`type` groups results. A line without `answer` calibrates, but is not scored.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps

from qig_serve.errors import UserError
from qig_serve.text_files import lines, parse_json

ImageSource = Path | bytes | Image.Image
"""A file, the bytes of an encoded picture, or a picture in memory."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files with these endings are pictures, in lower or upper case."""

_ROLES = ("system", "user", "assistant")
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
_TEXTS = frozenset({"id", "type", "answer", "messages", "conversations"})
"""Keys of a record that may speak of files."""


@dataclass(frozen=True)
class Sample:
    """One conversation, with the answer that is wanted."""

    id: str
    type: str
    messages: tuple[dict[str, Any], ...]
    """role, and content: a list of {"type": "text", "text"} and {"type": "image", "image"}."""
    answer: str | None = None

    @property
    def images(self) -> list[ImageSource]:
        """The pictures in the order in which the conversation names them."""
        return [p["image"] for m in self.messages for p in m["content"] if p["type"] == "image"]

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        last = next(m for m in reversed(self.messages) if m["role"] == "user")
        return "\n".join(p["text"] for p in last["content"] if p["type"] == "text")


def load_image(source: ImageSource) -> Image.Image:
    """The picture as RGB, as a person and the server see it; UserError when it cannot be read.

    Turned as its EXIF data say, transparency on white, the first picture of an animation: vLLM
    does the same. 16-bit greys keep their upper 8 bits, where vLLM and Pillow would cut at 255.
    Also refused, besides damaged files: more pixels than twice Pillow's limit (179 million), sides
    more than 200 times as long as each other (a processor that makes the short side 336 would
    make billions of pixels of 1 x 65535), and values without a known range (int32, float).
    """
    if isinstance(source, Image.Image):
        return _as_rgb(source, "the image in memory")
    name = f"the image {source}" if isinstance(source, Path) else "the data URL"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, or oddly encoded: read or refused below
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                return _as_rgb(image, name)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except _UNREADABLE as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from None


# What Pillow's decoders raise on damaged files. OSError covers UnidentifiedImageError.
_UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_LONGEST = 200
_SHOWN = 300  # characters of a name


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    short, long = sorted(image.size)
    if short == 0 or long > _LONGEST * short:
        raise UserError(
            f"{name} is {image.width} x {image.height} pixels: a side must not be longer than "
            f"{_LONGEST} times the other"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")  # a copy, which outlives the file
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"{name} has {'float' if image.mode == 'F' else '32-bit'} pixels whose "
            "range is not known: convert it to 8 bits"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def data_url(source: ImageSource) -> str:
    """The picture as a lossless data URL."""
    buffer = io.BytesIO()
    load_image(source).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_sha256(sample: Sample) -> str:
    """What makes two samples the same: the pixels and the text of the prompt, without the answer.

    So a picture stored twice in different files or formats is found, and so is a question that
    was calibrated on without its answer.
    """
    digest = hashlib.sha256()
    for message in sample.messages:
        digest.update(f"\0{message['role']}\0".encode())
        for part in message["content"]:
            if part["type"] == "text":
                digest.update(part["text"].strip().encode())
            else:
                image = load_image(part["image"])
                digest.update(f"\0image {image.size}\0".encode())
                digest.update(image.tobytes())
    return digest.hexdigest()


def set_sha256(hashes: Iterable[str]) -> str:
    """Hash of a set of samples: of their `sample_sha256`, whatever their order."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def sample_from_parts(
    identifier: str, kind: str, image: ImageSource, question: str, answer: str | None
) -> Sample:
    """The usual sample: one picture, then one question."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return Sample(identifier, kind, ({"role": "user", "content": content},), answer)


def read_samples(path: Path, n: int | None = None, scored: bool = False) -> list[Sample]:
    """The first `n` samples of a JSONL file; with `scored`, of those that have an answer.

    UserError, with the number of the line, for anything that is not a sample, for a missing
    picture, and when nothing is left.
    """
    if not path.is_file():
        raise UserError(f"the sample file {path} does not exist")
    samples: list[Sample] = []
    unscored = 0
    for number, line in lines(path):
        if n is not None and len(samples) >= n:
            break
        sample = _parse_line(line, f"{path}, line {number}", path.parent, number)
        if scored and not sample.answer:
            unscored += 1
            continue
        samples.append(sample)
    if not samples:
        if unscored:
            raise UserError(f"{path}: no line has an answer, so there is nothing to score")
        raise UserError(f"{path} holds no samples: it needs one JSON object per line")
    return samples


def _parse_line(line: str, where: str, folder: Path, number: int) -> Sample:
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    return parse_record(record, where, folder, number)


def parse_record(record: Any, where: str, folder: Path, number: int) -> Sample:
    """A sample from the value of its JSON; `number` names it if it has no id.

    Pictures are parts of the messages, or paths in "images" beside them, which take the places of
    the marks `<image>` in the texts (LLaMA-Factory) or of parts without a path (TRL).
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise UserError(f'{where}: a sample needs a "messages" list in OpenAI chat form')
    if record.get("conversations"):
        raise UserError(f'{where}: "messages" and "conversations": give the turns in one of them')
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f'{where}: "answer" must be text, not {type(answer).__name__}')
    check_media(record, where, read=("images",))
    images = _beside(record.get("images"), where, folder)
    count = len(images or ())
    messages = tuple(_parse_message(m, where, folder, images) for m in record["messages"])
    if images:
        raise UserError(
            f"{where}: {count} images, and {count - len(images)} marks <image> in the messages"
        )
    if not any(p["type"] == "image" for m in messages for p in m["content"]):
        check_files(record, where)
    if not messages or messages[-1]["role"] == "system":
        raise UserError(f"{where}: the conversation has no user turn")
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        # The conversation ends with its answer: take it as such, so that it is never a prompt.
        said = "".join(p.get("text", "") for p in messages[-1]["content"])
        answer, messages = (said if answer is None else answer), messages[:-1]
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation has no user turn")
    return Sample(str(record.get("id", number)), str(record.get("type", "all")), messages, answer)


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


def _beside(value: Any, where: str, folder: Path) -> list[ImageSource] | None:
    """The pictures of "images"; None where the record has none."""
    if not value:
        return None
    named = value if isinstance(value, list) else [value]
    if not all(isinstance(url, str) for url in named):
        raise UserError(f'{where}: "images" must be a list of paths')
    return [resolve_picture(url, where, folder) for url in named]


def split_marks(text: str, images: list[ImageSource], where: str) -> list[dict[str, Any]]:
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
    if message.get("tool_calls") or message.get("function_call"):
        raise UserError(
            f"{where}: calls of tools are not read: write them as text, as the model does"
        )
    content = message.get("content")
    if isinstance(content, str) and images is not None:
        return {"role": message["role"], "content": split_marks(content, images, where)}
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(f"{where}: the content of a message must be text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            check_media(part, where)
        elif kind is not None and part.get("text"):
            raise UserError(f"{where}: a part of type {kind!r} holds a text too: make them two")
        if images is not None and kind == "text" and isinstance(part.get("text"), str):
            parts += split_marks(part["text"], images, where)
        elif images is not None and kind == "image" and set(part) <= {"type", "text", "index"}:
            parts += split_marks("<image>", images, where)
        else:
            parts.append(_parse_part(part, where, folder))
    return {"role": message["role"], "content": parts}


def _parse_part(part: Any, where: str, folder: Path) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return {"type": "image", "image": resolve_picture(url, where, folder)}
    raise UserError(
        f"{where}: a part must be {{'type': 'text', 'text': ...}} or "
        "{'type': 'image_url', 'image_url': {'url': ...}}"
    )


def resolve_picture(url: str, where: str, folder: Path) -> ImageSource:
    """The picture that a path, a file:// URL or a data URL means; UserError, from `where` on."""
    if url[:5].lower() == "data:":
        try:
            data = base64.b64decode(url.partition(",")[2], validate=True)
        except ValueError:
            raise UserError(f"{where}: the data URL is not valid base64") from None
        if not data:
            raise UserError(f"{where}: the data URL holds no image")
        return data
    path = picture_path(url, folder)
    if path is None:
        raise UserError(f"{where}: {shown(url)} is on a network; give a file path or a data URL")
    if not os.path.isfile(path):
        fault = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"{where}: the image {shown(path)} {fault}")
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


def overlap(samples: Sequence[Sample], calibration: Iterable[str]) -> list[str]:
    """Ids of the samples whose hash is among those of the calibration samples."""
    known = set(calibration)
    return [s.id for s in samples if sample_sha256(s) in known]
