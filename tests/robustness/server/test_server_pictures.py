"""Pictures that are broken, too large, too many, or somewhere they must not be fetched from."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import tiny_llava
from helpers.server_process import Server, start_server
from PIL import Image
from requests_to import CHAT, Tally, assert_still_right, picture_body

pytestmark = pytest.mark.slow

PUBLIC = "93.184.216.34"
SEED = 8


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def ask(server: Server, tally: Tally, what: object, *urls: Any) -> httpx.Response:
    answer = httpx.post(server.url + CHAT, json=picture_body(*urls), timeout=120)
    tally.note(what, answer.status_code, answer.text)
    return answer


def all_refused(server: Server, urls: dict[str, Any]) -> Tally:
    """Each is answered with a 4xx that has a sentence."""
    tally = Tally()
    for what, url in urls.items():
        answer = ask(server, tally, what, url)
        assert answer.status_code in (400, 413, 422), (what, answer.status_code, answer.text)
        assert answer.json()["error"]["message"], what
    print(f"\n{tally}")
    return tally


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_truncated_and_flipped(server: Server, kind: str) -> None:
    """A cut picture is refused (or, where the format allows it, read); never the server's fault."""
    whole = encoded(tiny_llava.picture(size=40), kind)
    rng = random.Random(SEED)
    tally = Tally()
    for cut in sorted(rng.sample(range(len(whole)), 25)):
        answer = ask(server, tally, f"{kind} cut at {cut}", as_url(whole[:cut]))
        if kind in ("PNG", "JPEG") and cut < len(whole) - 16:
            assert answer.status_code == 400, cut
    for _ in range(60):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        ask(server, tally, f"{kind} {flipped.hex()}", as_url(bytes(flipped)))
    print(f"\n{kind}: {tally}")
    assert not tally.faults, "\n".join(tally.faults[:10])
    assert_still_right(server.url)


def test_not_pictures(server: Server) -> None:
    png = base64.b64encode(encoded(tiny_llava.picture(), "PNG")).decode()
    all_refused(
        server,
        {
            "empty": "data:image/png;base64,",
            "no base64": "data:image/png;base64,!!!!",
            "half a quantum": f"data:image/png;base64,{png[:-3]}",
            "spaces": f"data:image/png;base64,{png[:40]} {png[40:]}",
            "url-safe": "data:image/png;base64,_-_-",
            "not encoded": "data:image/png,abc",
            "percent": "data:image/png;charset=utf-8,%89PNG",
            "no comma": "data:image/png;base64",
            "text": as_url(b"GIF89a, or is it?"),
            "svg": as_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "svg+xml"),
            "postscript": as_url(
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
            ),
            "pickle": as_url(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR."),
            "scheme": "gopher://127.0.0.1/a.png",
            "script": "javascript:alert(1)",
            "bare": "a.png",
            "nul": "http://\x00/",
            "nothing": "",
        },
    )
    assert_still_right(server.url)


def test_decompression_bombs(server: Server) -> None:
    """400 megapixels in some kilobytes: refused before a pixel is decoded."""
    bomb = Image.new("1", (20_000, 20_000))
    lying = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    lying[18:26] = (20_000).to_bytes(4, "little") * 2
    urls = {
        "png": as_url(encoded(bomb, "PNG")),
        "tiff": as_url(encoded(bomb, "TIFF", compression="group4")),
        "bmp": as_url(bytes(lying)),
        "long": as_url(encoded(Image.new("1", (65_535, 6_000)), "PNG")),
    }
    began = time.monotonic()
    all_refused(server, urls)
    assert time.monotonic() - began < 10
    assert_still_right(server.url)


def test_unusual_pictures_are_read_or_refused(server: Server) -> None:
    tally = Tally()
    small = tiny_llava.picture(size=30)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV", "LAB"):
        for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
            try:
                data = encoded(small.convert(mode), kind)
            except (OSError, ValueError):  # Pillow writes no such file
                continue
            ask(server, tally, f"{mode} {kind}", as_url(data))
    for size in ((1, 1), (1, 3000), (3000, 1), (2, 4000)):
        ask(server, tally, size, as_url(encoded(small.resize(size), "PNG")))
    frames = [tiny_llava.picture(i, size=20) for i in range(50)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        ask(server, tally, f"animated {kind}", as_url(data))
    print(f"\n{tally}")
    assert not tally.faults, "\n".join(tally.faults[:10])
    assert tally.statuses[200] > 20
    assert_still_right(server.url)


def test_too_many_pictures(server: Server) -> None:
    tally = Tally()
    for count in (3, 50):
        urls = [tiny_llava.data_url(tiny_llava.picture(i, size=16)) for i in range(count)]
        answer = ask(server, tally, count, *urls)
        assert answer.status_code == 400, answer.text
    assert_still_right(server.url)


def test_files(server: Server) -> None:
    media = server.media
    tiny_llava.picture().save(media / "a.png")
    tiny_llava.picture().save(media.parent / "outside.png")
    (media / "link.png").unlink(missing_ok=True)
    (media / "link.png").symlink_to(media.parent / "outside.png")
    (media / "empty.png").write_bytes(b"")
    (media / "folder").mkdir(exist_ok=True)
    assert ask(server, Tally(), "allowed", f"file://{media}/a.png").status_code == 200
    all_refused(
        server,
        {
            "absent": f"file://{media}/none.png",
            "empty": f"file://{media}/empty.png",
            "folder": f"file://{media}/folder",
            "the path itself": f"file://{media}",
            "outside": f"file://{media.parent}/outside.png",
            "dots": f"file://{media}/../outside.png",
            "encoded dots": f"file://{media}/%2e%2e/outside.png",
            "encoded slash": f"file://{media}/..%2foutside.png",
            "link": f"file://{media}/link.png",
            "nul": f"file://{media}/a.png%00",
            "passwd": "file:///etc/passwd",
            "host": "file://elsewhere/etc/passwd",
            "localhost": "file://localhost/etc/passwd",
            "endless": "file:///dev/zero",
            "process": "file:///proc/self/environ",
            "long": f"file://{media}/{'a' * 5000}.png",
            "case": "FILE:///etc/passwd",
            "no path": "file://",
        },
    )
    assert_still_right(server.url)


@dataclass
class Internet:
    """What there is to be fetched, and what was."""

    public: ThreadingHTTPServer
    inside: list[ThreadingHTTPServer]
    log: Path
    hits: list[str] = field(default_factory=list)
    """Requests that arrived where none may."""

    @property
    def public_port(self) -> int:
        return int(self.public.server_address[1])

    @property
    def inside_port(self) -> int:
        return int(self.inside[0].server_address[1])

    def seen(self, verb: str) -> list[list[Any]]:
        lines = map(json.loads, self.log.read_text().splitlines())
        return [rest for first, *rest in lines if first == verb]


@pytest.fixture(scope="module")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    """A public web server that the test owns, and listeners on loopback that nobody may reach."""
    hits: list[str] = []
    picture = encoded(tiny_llava.picture(), "PNG")

    class Public(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            inside = f"http://127.0.0.1:{internet.inside_port}/secret"
            redirects = {
                "/to-loopback": inside,
                "/to-metadata": "http://169.254.169.254/latest/meta-data/",
                "/to-file": "file:///etc/passwd",
                "/to-itself": "/to-itself",
            }
            if self.path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[self.path])
                self.end_headers()
                return
            if self.path in ("/404", "/500", "/429"):
                self.send_error(int(self.path[1:]))
                return
            if self.path == "/drop":
                self.connection.close()
                return
            self.send_response(200)
            body = b"<html>" if self.path == "/html" else picture
            if self.path == "/short":
                self.send_header("Content-Length", str(len(body) + 100))
            self.end_headers()
            try:
                self.wfile.write(body)
                while self.path == "/endless":
                    self.wfile.write(bytes(1 << 20))
            except OSError:
                pass  # the server under test had enough

        def log_message(self, *_: Any) -> None:
            pass

    class Inside(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *_: Any) -> None:
            pass

    class Inside6(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    inside = [ThreadingHTTPServer(("127.0.0.1", 0), Inside)]
    inside.append(Inside6(("::1", inside[0].server_port), Inside))
    log = tmp_path_factory.mktemp("internet") / "log"
    log.touch()
    internet = Internet(ThreadingHTTPServer(("127.0.0.1", 0), Public), inside, log, hits)
    servers = [internet.public, *inside]
    for web in servers:
        threading.Thread(target=web.serve_forever, daemon=True).start()
    yield internet
    for web in servers:
        web.shutdown()
        web.server_close()


NAMES: dict[str, list[list[str]]] = {
    "cdn.test": [[PUBLIC]],
    "loopback.test": [["127.0.0.1"]],
    "metadata.test": [["169.254.169.254"]],
    "private.test": [["10.0.0.1"]],
    "six.test": [["::1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "local6.test": [["fe80::1"]],
    "unique6.test": [["fd00::1"]],
    "nat64.test": [["64:ff9b::a9fe:a9fe"]],
    "mixed.test": [[PUBLIC, "127.0.0.1"]],
    "rebind.test": [["127.0.0.1"], [PUBLIC], ["127.0.0.1"]],
    "nowhere.test": [[]],
}
WRITTEN = (
    "127.0.0.1",
    "localhost",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "127.1",
    "0x7f.1",
    "0177.0.0.1",
    "2130706433",
    "0.0.0.0",
    "[::]",
    "169.254.169.254",
    "[fe80::1]",
    "10.0.0.1",
)


@pytest.fixture(scope="module")
def fetching(
    checkpoint: Path, internet: Internet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that fetches from all these names: only the address check is in the way."""
    fake = Path(__file__).parent / "fake_internet"
    public = [PUBLIC, internet.public_port]
    settings = {"names": NAMES, "public": public, "log": str(internet.log)}
    domains = [*NAMES, *WRITTEN, *(host.strip("[]") for host in WRITTEN if host[0] == "[")]
    with pytest.MonkeyPatch.context() as patch:
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(fake), inherited])))
        patch.setenv("QIG_TEST_INTERNET", json.dumps(settings))
        patch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "1")
        limit = ["--limit-mm-per-prompt", '{"image": 64, "video": 0}', "--max-body-mb", "4"]
        started = start_server(
            checkpoint,
            tmp_path_factory.mktemp("fetching"),
            "--allowed-media-domains",
            *domains,
            *limit,
        )
    yield started
    started.stop()


def test_public_picture_is_fetched(fetching: Server, internet: Internet) -> None:
    """So that the refusals below mean something."""
    answer = ask(fetching, Tally(), "cdn", f"http://cdn.test:{internet.public_port}/a.png")
    assert answer.status_code == 200, answer.text
    assert [PUBLIC, internet.public_port] in internet.seen("connect")


def test_nothing_inside_is_reached(fetching: Server, internet: Internet) -> None:
    inside, public = internet.inside_port, internet.public_port
    before = len(internet.seen("connect"))
    urls = {name: f"http://{name}:{inside}/secret" for name in NAMES if name != "cdn.test"}
    del urls["rebind.test"]
    urls |= {f"written {host}": f"http://{host}:{inside}/secret" for host in WRITTEN}
    urls |= {
        "user": f"http://cdn.test@127.0.0.1:{inside}/secret",
        "not allowed": f"http://elsewhere.test:{inside}/secret",
        "fragment": f"http://127.0.0.1:{inside}#@cdn.test/secret",
        "backslash": f"http://127.0.0.1:{inside}\\@cdn.test/secret",
        "trailing dot": f"http://localhost.:{inside}/secret",
        "scheme": f"ftp://cdn.test:{public}/a.png",
    }
    all_refused(fetching, urls)
    assert internet.hits == []
    assert internet.seen("connect")[before:] == []
    assert_still_right(fetching.url)


def test_redirects_are_not_followed(fetching: Server, internet: Internet) -> None:
    paths = ("/to-loopback", "/to-metadata", "/to-file", "/to-itself")
    before = len(internet.seen("connect"))
    base = f"http://cdn.test:{internet.public_port}"
    all_refused(fetching, {path: base + path for path in paths})
    assert internet.hits == []
    assert {host for host, _ in internet.seen("connect")[before:]} <= {PUBLIC}


def test_a_name_that_changes_its_address(fetching: Server, internet: Internet) -> None:
    """The address that was checked is the one that is connected to, whatever the name says next."""
    before = len(internet.seen("connect"))
    tally = Tally()
    for port in (internet.inside_port, internet.public_port, internet.inside_port):
        for _ in range(4):
            ask(fetching, tally, port, f"http://rebind.test:{port}/a.png")
    print(f"\n{tally}")
    assert not tally.faults, "\n".join(tally.faults)
    assert internet.hits == []
    assert {host for host, _ in internet.seen("connect")[before:]} <= {PUBLIC}


def test_a_picture_that_cannot_be_fetched(fetching: Server, internet: Internet) -> None:
    base = f"http://cdn.test:{internet.public_port}"
    paths = ("/404", "/429", "/500", "/drop", "/short", "/html", "/endless")
    urls = {path: base + path for path in paths}
    urls["closed port"] = "http://cdn.test:9/a.png"
    urls["no such port"] = "http://cdn.test:99999/a.png"
    urls["not TLS"] = f"https://cdn.test:{internet.public_port}/a.png"
    all_refused(fetching, urls)
    assert_still_right(fetching.url)


def test_fifty_small_pictures(fetching: Server) -> None:
    """Within the number allowed here, but longer than the model's context."""
    urls = [tiny_llava.data_url(tiny_llava.picture(i, size=16)) for i in range(50)]
    answer = ask(fetching, Tally(), 50, *urls)
    assert answer.status_code == 400 and "512" in answer.text, answer.text
    assert_still_right(fetching.url)
