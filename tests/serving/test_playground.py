"""The page at `/` in a real browser, before a stand-in for the server's API."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from helpers import tiny_llava
from helpers.server_process import Server

from qig_serve import serving
from qig_serve.demo import questions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PAGE = Path(serving.__file__).parent / "playground.html"
SECONDS = 60
WORDS = ["Two ", "red ", "stars <b>", "& a circle."]
MODEL = "demo-w4a8"


class Api:
    """Answers as the server does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fail = False
        self.keyed = False
        """Whether requests need what the browser has; a cookie stands in for the password."""

    async def page(self, _: web.Request) -> web.Response:
        answer = web.Response(text=PAGE.read_text(), content_type="text/html")
        if self.keyed:
            answer.set_cookie("key", "secret")
        return answer

    async def models(self, request: web.Request) -> web.Response:
        if self.keyed and "key" not in request.cookies:
            return web.json_response({}, status=401)
        return web.json_response({"data": [{"id": MODEL}]})

    async def quantization(self, _: web.Request) -> web.Response:
        sizes = {"quantized": 3 << 20, "other": 5 << 20}
        return web.json_response(
            {"scheme": "w4a8", "method": "qig", "device": "cpu", "weight_bytes": sizes}
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.fail:
            return web.json_response({"error": {"message": "the picture is too large"}}, status=400)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for word in WORDS:
            event = "data: " + json.dumps({"choices": [{"delta": {"content": word}}]}) + "\n\n"
            for piece in (event[:9], event[9:]):  # events need not arrive whole
                await answer.write(piece.encode())
                await asyncio.sleep(0.02)
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": 4}})
        await answer.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
        return answer


@asynccontextmanager
async def api_server(api: Api) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/", api.page)
    app.router.add_get("/v1/models", api.models)
    app.router.add_get("/v1/quantization", api.quantization)
    app.router.add_post("/v1/chat/completions", api.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


class Browser:
    """One tab, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.number = 0
        self.errors: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=SECONDS)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("id") == self.number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    async def run(self, script: str) -> Any:
        done = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, condition: str) -> None:
        async with asyncio.timeout(SECONDS):
            while not await self.run(condition):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
        "--window-size=1100,800",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(SECONDS):
            while not port_file.exists() or not port_file.read_text().strip():
                await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with http.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Browser(socket)
                await tab.call("Runtime.enable")
                yield tab
    finally:
        process.kill()
        await process.wait()


PASTE = """
(async () => {
  const blob = await (await fetch("%s")).blob();
  const data = new DataTransfer();
  data.items.add(new File([blob], "it's a \\"picture\\".png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
})()
"""


def test_paste_a_picture_and_ask(tmp_path: Path) -> None:
    url = tiny_llava.data_url(tiny_llava.picture(size=240))

    async def go() -> None:
        api = Api()
        async with api_server(api) as server, browser(tmp_path / "profile") as tab:
            await tab.call("Page.enable")
            # As a link that carries the key does, whose address fetch refuses.
            await tab.call("Page.navigate", url=server.replace("//", "//user:key@"))
            await tab.until("document.getElementById('model')?.textContent.includes('w4a8 ·')")
            header = await tab.run("document.getElementById('model').textContent")
            assert header == f"{MODEL} · w4a8 · qig · 8.0 MiB of weights · cpu"

            await tab.run(PASTE % url)
            await tab.until("document.querySelector('#drop img')?.complete")
            await tab.run(
                "const q = document.getElementById('question');"
                'q.value = "What\'s \\"here\\"?"; q.oninput()'
            )
            await tab.run("document.getElementById('ask').click()")
            await tab.until("document.getElementById('speed').textContent.includes('tokens/s')")
            assert await tab.run("document.getElementById('answer').textContent") == "".join(WORDS)
            content = api.asked[0]["messages"][0]["content"]
            assert content[0]["image_url"]["url"] == url
            assert content[1]["text"] == 'What\'s "here"?' and api.asked[0]["stream"] is True

            await tab.run("document.querySelector('details').open = true")
            python = await tab.run("document.getElementById('python').textContent")
            compile(python, "python", "exec")
            assert json.dumps('What\'s "here"?') in python and server in python
            await check_curl(await tab.run("document.getElementById('curl').textContent"), tmp_path)

            shot = await tab.call("Page.captureScreenshot", format="png")
            target = Path(os.environ.get("QIG_SCREENSHOTS", tmp_path)) / "playground.png"
            target.write_bytes(base64.b64decode(shot["data"]))

            api.fail = True
            await tab.run("document.getElementById('ask').click()")
            await tab.until("document.getElementById('answer').className === 'error'")
            answer = await tab.run("document.getElementById('answer').textContent")
            assert answer == "400: the picture is too large"
            assert tab.errors == []

            api.keyed = True
            await tab.call("Page.navigate", url=server)
            await tab.until("document.getElementById('curl')?.textContent.includes('$API_KEY')")
            python = await tab.run("document.getElementById('python').textContent")
            compile(python, "python", "exec")
            assert 'api_key=os.environ["API_KEY"]' in python and "base64" not in python

    asyncio.run(go())


DROP = """
(async () => {
  const blob = await (await fetch("%s")).blob();
  const data = new DataTransfer();
  data.items.add(new File([blob], "scene.png", { type: "image/png" }));
  const drop = document.getElementById("drop");
  drop.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
})()
"""


@pytest.mark.slow
def test_drop_a_picture_before_the_real_server(server: Server, tmp_path: Path) -> None:
    """The answer comes in pieces, and is the one that the Python shown on the page gets."""
    sample = next(s for s in questions.samples("test", 200) if s.type == "caption")

    async def go() -> None:
        async with browser(tmp_path / "profile") as tab:
            await tab.call("Page.enable")
            await tab.call("Page.navigate", url=server.url)
            await tab.until("document.getElementById('model')?.textContent.includes('w4a8 ·')")
            await tab.run(DROP % tiny_llava.data_url(sample.image))
            await tab.until("document.querySelector('#drop img')?.complete")
            await tab.run(
                "window.lengths = new Set(); const a = document.getElementById('answer');"
                "new MutationObserver(() => lengths.add(a.textContent.length))"
                ".observe(a, { childList: true });"
                f"const q = document.getElementById('question'); q.value = {sample.question!r};"
                "q.oninput(); document.getElementById('ask').click()"
            )
            await tab.until("document.getElementById('speed').textContent.includes('tokens/s')")
            answer = await tab.run("document.getElementById('answer').textContent")
            assert answer.startswith("a ") and await tab.run("lengths.size") > 3
            await tab.run("document.querySelector('details').open = true")
            sample.image.save(tmp_path / "scene.png")
            python = await tab.run("document.getElementById('python').textContent")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", python, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
            )
            printed, _ = await process.communicate()
            assert printed.decode().strip() == answer.strip()
            shot = await tab.call("Page.captureScreenshot", format="png")
            target = Path(os.environ.get("QIG_SCREENSHOTS", tmp_path)) / "server.png"
            target.write_bytes(base64.b64decode(shot["data"]))
            assert tab.errors == []

    asyncio.run(go())


async def check_curl(command: str, folder: Path) -> None:
    """The command line, run in a shell with curl replaced, sends the question and the picture."""
    (folder / 'it\'s a "picture".png').write_bytes(b"pixels")
    script = 'curl() { printf "%s" "${@: -1}"; }\n' + command
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, cwd=folder, stdout=asyncio.subprocess.PIPE
    )
    sent, _ = await process.communicate()
    content = json.loads(sent)["messages"][0]["content"]
    encoded = base64.b64encode(b"pixels").decode()
    assert content[0]["image_url"]["url"] == f"data:image/png;base64,{encoded}"
    assert content[1]["text"] == 'What\'s "here"?'
