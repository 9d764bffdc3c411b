"""Pictures from strangers in calibration: each is read as a person sees it, or its sample named."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qig_serve.errors import UserError
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.samples import load_image, sample_from_parts

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def processor() -> Any:
    from qig_serve.demo.model import get_spec, make_processor, train_tokenizer

    corpus = ["Describe the image.", "a red star", "user\n", "assistant\n"] * 20
    return make_processor(get_spec("llava"), train_tokenizer(corpus, 400))


def calibrate(picture: Path | bytes, processor: Any) -> Any:
    sample = sample_from_parts("s-7", "caption", picture, "What is it?", "a star")
    return make_batches([sample], processor, processor.image_token_id)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int = 8, rows: bytes | None = None) -> bytes:
    """A greyscale PNG with any size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = bytes((width * bits // 8 + 1) * height) if rows is None else rows
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def cmyk() -> bytes:
    return encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", quality=100)


def palette() -> bytes:
    return encoded(Image.new("RGB", (40, 30), "red").convert("P"), "PNG")


def palette_with_holes() -> bytes:
    image = Image.new("P", (40, 30), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 20, 30))
    return encoded(image, "PNG", transparency=0)


def transparent() -> bytes:
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 20, 30))
    return encoded(image, "PNG")


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), c) for c in ("red", "blue", "green")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def sixteen_bits(kind: str) -> bytes:
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    return encoded(Image.fromarray(ramp), kind)


def turned() -> bytes:
    image = Image.new("RGB", (40, 30), "white")
    image.paste(RED, (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return encoded(image, "PNG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("make", "corner", "opposite"),
    [
        (cmyk, RED, RED),
        (palette, RED, RED),
        (palette_with_holes, RED, WHITE),
        (transparent, RED, WHITE),
        (lambda: animated("GIF"), RED, RED),
        (lambda: animated("WEBP"), RED, RED),
        (lambda: animated("PNG"), RED, RED),
        (lambda: sixteen_bits("PNG"), (0, 0, 0), WHITE),
        (lambda: sixteen_bits("TIFF"), (0, 0, 0), WHITE),
        (turned, RED, WHITE),
    ],
    ids=[
        "cmyk",
        "palette",
        "palette-transparency",
        "alpha",
        "animated-gif",
        "animated-webp",
        "animated-png",
        "16-bit-png",
        "16-bit-tiff",
        "exif-rotated",
    ],
)
def test_read_as_seen(
    make: Callable[[], bytes], corner: tuple[int, ...], opposite: tuple[int, ...], processor: Any
) -> None:
    image = load_image(make())
    assert image.mode == "RGB"
    assert image.size == ((30, 40) if make is turned else (40, 30))
    for place, wanted in (((0, 0), corner), ((image.width - 1, image.height - 1), opposite)):
        seen: Any = image.getpixel(place)
        assert max(abs(a - b) for a, b in zip(seen, wanted, strict=True)) <= 2
    assert calibrate(make(), processor)


def test_turned_pictures_lie_as_the_server_turns_them() -> None:
    """The upper half is red once the camera's left half is turned clockwise."""
    image = load_image(turned())
    assert image.getpixel((29, 0)) == RED and image.getpixel((0, 39)) == WHITE


def test_a_turn_that_cannot_be_noted() -> None:
    """EXIF data with a tag of a wrong type: Pillow cannot write them again, vLLM goes on."""
    tags = b"\x00\x01\x02\0\x04\0\0\0abc\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    assert load_image(encoded(Image.new("RGB", (40, 30), RED), "JPEG", exif=exif)).size == (40, 30)


def test_a_sixteen_bit_ramp_keeps_its_middle() -> None:
    """Pillow's conversion, and vLLM's, would make all but the first 256 of 65536 greys white."""
    values = np.asarray(load_image(sixteen_bits("PNG")))
    assert abs(float(values.mean()) - 127.5) < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "cannot be read"),
        (lambda: b"no picture at all", "cannot be read"),
        (lambda: encoded(Image.effect_noise((40, 30), 90), "PNG")[:-300], "cannot be read"),
        (lambda: cmyk()[:200], "cannot be read"),
        (lambda: png(0, 0), "cannot be read|0 x 0"),
        (lambda: png(0, 5), "cannot be read|0 x 5"),
        (lambda: png(1, 65535), "1 x 65535 pixels"),
        (lambda: png(65535, 1), "65535 x 1 pixels"),
        (lambda: png(40_000, 40_000, rows=b""), "1600000000 pixels"),
        (lambda: encoded(Image.new("F", (40, 30)), "TIFF"), "float pixels"),
        (lambda: encoded(Image.new("RGB", (40, 30)), "EPS"), "is EPS: convert it to PNG"),
        (lambda: b"<!DOCTYPE html>", "its bytes are of no known format"),
    ],
    ids=[
        "empty",
        "text",
        "cut-png",
        "cut-jpeg",
        "0x0",
        "0x5",
        "1x65535",
        "65535x1",
        "1600-megapixels",
        "float",
        "eps",
        "web-page",
    ],
)
def test_refused_by_the_name_of_the_sample(
    make: Callable[[], bytes], message: str, processor: Any, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(make())
    for picture in (make(), file):
        with pytest.raises(UserError, match=f"calibration sample s-7: .*({message})") as caught:
            calibrate(picture, processor)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_hundred_megapixels_are_read(processor: Any, recwarn: pytest.WarningsRecorder) -> None:
    (batch,) = calibrate(png(10_000, 10_000), processor)
    assert batch.ids == ("s-7",)
    assert not [w for w in recwarn if "bomb" in str(w.message)]


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, dropped or put in, most of them near the start."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(out), 80)) if rng.random() < 0.6 else rng.randrange(len(out))
        kind = rng.random()
        if kind < 0.6:
            out[at] = rng.randrange(256)
        elif kind < 0.8:
            del out[at : at + rng.randint(1, 8)]
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        out = out or bytearray(b"x")
    return bytes(out)


def spoil_many(count: int) -> dict[str, int]:
    """How often a spoiled picture was read and how often refused; anything else raises."""
    rng = random.Random(0)
    noise = Image.effect_noise((40, 40), 90).convert("RGB")
    seeds = [encoded(noise, k) for k in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO")]
    seeds += [cmyk(), palette(), transparent(), turned(), animated("GIF"), animated("PNG")]
    seeds += [sixteen_bits("PNG"), sixteen_bits("TIFF")]
    reported = {"read": 0, "refused": 0}
    for _ in range(count):
        try:
            load_image(spoiled(rng.choice(seeds), rng))
            reported["read"] += 1
        except UserError:
            reported["refused"] += 1
    return reported


def test_spoiled_pictures_never_crash() -> None:
    reported = spoil_many(1500)
    assert reported["read"] > 20 and reported["refused"] > 200


@pytest.mark.slow
def test_many_spoiled_pictures_never_crash() -> None:
    reported = spoil_many(100_000)
    print(reported)
    assert min(reported.values()) > 1000
