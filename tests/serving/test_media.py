"""Which pictures the server takes, and from where."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from helpers import tiny_llava
from helpers.picture_server import picture_server
from PIL import Image

from qig_serve.serving import media
from qig_serve.serving.media import GuardedMediaConnector, is_public
from qig_serve.vllm_plugin import compat

REFUSED = (ValueError, compat.validation_error())  # what vLLM's server answers with 400


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def fetch(connector: GuardedMediaConnector, url: str, sync: bool = False) -> Image.Image:
    if sync:
        return connector.fetch_image(url)
    return asyncio.run(connector.fetch_image_async(url))


@pytest.mark.parametrize("sync", [False, True])
def test_remote_pictures_are_off_by_default(sync: bool) -> None:
    with pytest.raises(REFUSED, match="--allowed-media-domains"):
        fetch(GuardedMediaConnector(), "http://example.org/a.png", sync)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "169.254.169.254"])
def test_written_addresses_must_be_public_even_if_allowed(host: str) -> None:
    connector = GuardedMediaConnector(allowed_media_domains=[host, host.strip("[]")])
    with pytest.raises(REFUSED, match="not a public address"):
        fetch(connector, f"http://{host}:9/a.png")


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("host", ["localhost", "0x7f.1"])
def test_names_are_checked_after_resolution(host: str, sync: bool) -> None:
    connector = GuardedMediaConnector(allowed_media_domains=[host])
    with pytest.raises(REFUSED, match=r"resolves to (127\.0\.0\.1|::1), which is not a public"):
        fetch(connector, f"http://{host}:9/a.png", sync)


def test_other_domains_are_refused() -> None:
    connector = GuardedMediaConnector(allowed_media_domains=["example.org"])
    for host in ("example.com", "example.org.evil.com", "sub.example.org"):
        with pytest.raises(REFUSED, match="not an allowed media domain"):
            fetch(connector, f"http://{host}/a.png")
    with pytest.raises(REFUSED, match="not an allowed media domain"):
        fetch(connector, "http://example.org@evil.com/a.png")


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server with a picture."""
    with picture_server() as port:
        yield port


def test_allowed_domain_is_fetched_but_redirects_are_not_followed(
    web: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "is_public", lambda address: True)  # stands in for the internet
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    connector = GuardedMediaConnector(allowed_media_domains=["localhost"])
    picture = fetch(connector, f"http://localhost:{web}/a.png")
    assert list(picture.getdata()) == list(tiny_llava.picture().getdata())
    with pytest.raises(REFUSED, match="Failed to load image"):
        fetch(
            GuardedMediaConnector(allowed_media_domains=["localhost"]),
            f"http://localhost:{web}/there",
        )


def test_what_cannot_be_fetched_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the port: the request's fault, which vLLM would answer with 500."""
    monkeypatch.setattr(media, "is_public", lambda address: True)
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(REFUSED, match="cannot be loaded"):
            fetch(
                GuardedMediaConnector(allowed_media_domains=["localhost"]),
                f"http://localhost:{port}/a.png",
            )


@pytest.mark.parametrize("where", ["data", "file"])
def test_pixel_cap_before_decoding(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIG_SERVE_MAX_IMAGE_PIXELS", "3600")
    connector = GuardedMediaConnector(allowed_local_media_path=str(tmp_path))

    def url(size: int) -> str:
        image = tiny_llava.picture(size=size)
        if where == "data":
            return tiny_llava.data_url(image)
        image.save(tmp_path / f"{size}.png")
        return f"file://{tmp_path}/{size}.png"

    assert fetch(connector, url(60)).size == (60, 60)
    with pytest.raises(REFUSED, match="61 x 61, more than the 3600 pixels"):
        fetch(connector, url(61))


def test_files_only_under_the_allowed_path(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    tiny_llava.picture().save(outside / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    connector = GuardedMediaConnector(allowed_local_media_path=str(inside))
    for path in (outside / "a.png", inside / "link.png", inside / ".." / "out" / "a.png"):
        with pytest.raises(REFUSED, match="subpath"):
            fetch(connector, f"file://{path}")
    with pytest.raises(REFUSED, match="cannot load the file"):
        fetch(connector, f"file://{inside}/none.png")
    with pytest.raises(REFUSED, match="--allowed-local-media-path"):
        fetch(GuardedMediaConnector(), f"file://{outside}/a.png")


def test_whatever_a_decoder_raises_is_a_refusal() -> None:
    """libavif's errors are RuntimeError and SyntaxError, which vLLM would answer with 500."""
    buffer = io.BytesIO()
    tiny_llava.picture(size=32).save(buffer, "AVIF")
    refused = 0
    for place in range(0, 300, 3):
        data = bytearray(buffer.getvalue())
        data[place] ^= 0xFF
        try:
            fetch(
                GuardedMediaConnector(), f"data:image/avif;base64,{base64.b64encode(data).decode()}"
            )
        except REFUSED:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,AAAA", "data:image/png,abc", "ftp://x/a.png", "a.png", ""],
)
def test_nonsense(url: str) -> None:
    with pytest.raises(REFUSED, match=r"."):
        fetch(GuardedMediaConnector(), url)
