"""Samples: the one JSON line that calibration and evaluation both read.

    {"id": "7", "type": "count", "answer": "3", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "images/7.png"}},
        {"type": "text", "text": "How many stars are there?"}]}]}

Image paths are relative to the file; data URLs are allowed; nothing is fetched from a network.
`type` groups results. A line without `answer` calibrates, but is not scored.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qig_serve.errors import UserError

ImageSource = Path | bytes | Image.Image
"""A file, the bytes of an encoded picture, or a picture in memory."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files with these endings are pictures, in lower or upper case."""


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
                if image.format in _PROGRAMS:
                    raise UserError(f"{name} is {image.format}: convert it to PNG")
                return _as_rgb(image, name)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} cannot be read as an image: its bytes are of no known format"
        ) from None
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
_PROGRAMS = ("EPS", "WMF", "EMF")
"""Drawings that other programs would have to run; vLLM takes none either."""
_LONGEST = 200


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    short, long = sorted(image.size)
    if short == 0 or long > _LONGEST * short:
        raise UserError(
            f"{name} is {image.width} x {image.height} pixels: a side must not be longer than "
            f"{_LONGEST} times the other"
        )
    with contextlib.suppress(Exception):  # of EXIF data that cannot be written again
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


def overlap(samples: Sequence[Sample], calibration: Iterable[str]) -> list[str]:
    """Ids of the samples whose hash is among those of the calibration samples."""
    known = set(calibration)
    return [s.id for s in samples if sample_sha256(s) in known]
