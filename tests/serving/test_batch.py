"""Batch generation: the runner around a stand-in application, and the command itself."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_llava
from helpers.server_process import ENGINE, engine_of, environment
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qig_serve import batch
from qig_serve.batch import EngineDied, Runner, Totals
from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.serving import batch_io
from qig_serve.serving.batch_results import Results
from qig_serve.serving.in_process import Chat


def write_batch(path: Path, count: int, **body: Any) -> Path:
    (path.parent / "images").mkdir(exist_ok=True)
    with path.open("w") as file:
        for i in range(count):
            image = f"images/{i % 4}.png"
            tiny_llava.picture(i % 4).save(path.parent / image)
            content = [
                {"type": "image_url", "image_url": {"url": image}},
                {"type": "text", "text": f"What is number {i}?"},
            ]
            request = {"messages": [{"role": "user", "content": content}], "max_tokens": 4} | body
            row = {"custom_id": f"r{i}", "method": "POST", "url": batch_io.URL, "body": request}
            file.write(json.dumps(row) + "\n")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Engine:
    """A chat route that answers after a while, and dies at a question that says so."""

    def __init__(self) -> None:
        self.errored = False
        self.running = self.most = self.seen = 0

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.seen += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.002)
        self.running -= 1
        image, question = body["messages"][0]["content"]
        if "number 30" in question["text"]:
            self.errored = self.deadly
        if "number 7?" in question["text"]:
            return JSONResponse({"error": {"message": "seven", "code": 400}}, 400)
        if "number 8?" in question["text"]:
            return Response("not JSON", 500)
        if "number 9?" in question["text"]:
            raise RuntimeError("a fault in the application")
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        if "number 11?" in question["text"]:
            return JSONResponse({"error": {"message": "a broken picture", "code": 400}}, 400)
        choice = {"message": {"content": question["text"]}}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": 2}})

    deadly = False


def run(
    engine: Engine, source: Path, output: Path, resume: bool = False, chat: Chat | None = None
) -> Totals:
    app = Starlette(routes=[Route(batch_io.URL, engine.answer, methods=["POST"])])
    results = Results(output, resume)

    async def go() -> Totals:
        fake: Any = engine
        runner = Runner(app, fake, source.parent, results, lambda totals: None, chat)
        await runner.run(batch_io.read_requests(source, None, {"model": "m"}), 5)
        return runner.totals

    try:
        return asyncio.run(go())
    finally:
        results.close()


def test_every_line_gets_one_row(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", 20)
    with source.open("a") as file:
        file.write("{torn\n")
    (tmp_path / "images" / "3.png").unlink()
    engine = Engine()
    totals = run(engine, source, tmp_path / "out.jsonl")
    rows = {row["line"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert sorted(rows) == list(range(1, 22)) and engine.most == 5
    assert batch_io.answer_text(rows[1]) == "What is number 0?"
    assert rows[21]["error"]["message"].startswith("line 21: not JSON")
    assert rows[8]["error"]["message"].startswith("line 8: cannot read the picture")
    assert rows[9]["error"] == {"code": "500", "message": "line 9: not JSON"}
    assert rows[10]["error"] == {"code": "500", "message": "line 10: Internal Server Error"}
    assert totals.done == 21 and totals.failed == 8 and totals.tokens == 2 * 13


def test_off_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_SECONDS_A_LINE", 0.01)
    with batch._Progress(4) as progress:
        time.sleep(0.02)
        progress(Totals(done=1, skipped=1, tokens=20))
    assert re.fullmatch(r"2/4 requests, [\d.]+ req/s, \d+ tok/s\n", capsys.readouterr().err)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """vLLM's sentence names none; a refusal for another reason blames no picture."""
    pytest.importorskip("vllm")
    source = write_batch(tmp_path / "in.jsonl", 12)
    picture = tmp_path / "images" / "3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    run(Engine(), source, tmp_path / "out.jsonl")
    rows = {row["line"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert rows[12]["error"]["message"] == f"line 12: {picture}: a broken picture"
    picture.write_bytes((tmp_path / "images" / "0.png").read_bytes())
    run(Engine(), source, tmp_path / "again.jsonl")
    rows = {row["line"]: row for row in read_rows(tmp_path / "again.jsonl")}
    assert rows[12]["error"]["message"] == "line 12: a broken picture"


def test_resume_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    source, output = write_batch(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    run(Engine(), source, output)
    kept = output.read_bytes().splitlines(keepends=True)[:4]
    output.write_bytes(b"".join(kept) + b'{"id": "batch_re')  # killed in the middle of a row
    engine = Engine()
    totals = run(engine, source, output, resume=True)
    assert sorted(row["line"] for row in read_rows(output)) == list(range(1, 13))
    assert engine.seen == totals.done == 8 and totals.skipped == 4
    with pytest.raises(UserError, match="--resume"):
        run(engine, source, output)


def test_dead_engine_ends_the_batch_and_blames_no_request(tmp_path: Path) -> None:
    source, output = write_batch(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    engine = Engine()
    engine.deadly = True
    with pytest.raises(EngineDied):
        run(engine, source, output)
    rows = read_rows(output)
    assert 0 < len(rows) < 60 and all(row["line"] != 31 for row in rows)
    assert run(Engine(), source, output, resume=True).done == 60 - len(rows)


class Handler:
    """Stands for vLLM's chat handler: some bodies it answers, one with an error, one not at all."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    async def create_chat_completion(self, request: Any) -> Any:
        from qig_serve.vllm_plugin import compat

        text = request.messages[0]["content"][1]["text"]
        if "number 1?" in text:
            raise RuntimeError("a fault in the handler")
        if "number 2?" in text:
            return "an error, or a stream"
        self.ids.append(request.request_id)
        message = {"role": "assistant", "content": "direct"}
        return compat.chat_response()(
            model=request.model,
            choices=[{"index": 0, "message": message}],
            usage={"completion_tokens": 3},
        )


def test_chat_goes_to_the_handler_and_what_it_cannot_answer_to_the_application(
    tmp_path: Path,
) -> None:
    pytest.importorskip("vllm")
    from qig_serve.serving.in_process import chat_of

    source = write_batch(tmp_path / "in.jsonl", 4)
    with source.open("a") as file:
        file.write(json.dumps({"custom_id": "bad", "body": {"messages": [], "max_tokens": "x"}}))
    engine, handler = Engine(), Handler()
    totals = run(engine, source, tmp_path / "out.jsonl", chat=chat_of(handler))
    rows = {row["line"]: row for row in read_rows(tmp_path / "out.jsonl")}
    texts = [batch_io.answer_text(rows[line]) for line in range(1, 5)]
    assert texts == ["direct", "What is number 1?", "What is number 2?", "direct"]
    assert engine.seen == 3 and rows[5]["error"]["code"] == "500"
    assert handler.ids == [rows[line]["response"]["request_id"] for line in (1, 4)]
    assert totals.done == 5 and totals.failed == 1 and totals.tokens == 2 * 2 + 2 * 3
    assert totals.first_errors == [rows[5]["error"]["message"]]


def command(checkpoint: Path, *arguments: str | Path) -> list[str]:
    own = [sys.executable, "-m", "qig_serve", "generate", checkpoint, *arguments, *ENGINE]
    return [str(word) for word in own]


@contextmanager
def start(words: list[str], output: Path, rows: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it has written so many rows."""
    with output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(words, env=environment(), stderr=log, start_new_session=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if output.exists() and output.read_bytes().count(b"\n") > rows:
            break
        assert process.poll() is None
        time.sleep(0.05)
    yield process


def test_without_a_line_to_send_no_engine_is_started(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("vllm")
    source, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    shutil.rmtree(tmp_path / "images")
    with source.open("a") as file:
        file.write("{torn\n" * 9)

    async def started(*_: Any) -> Totals:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(batch, "_run", started)
    words = ["generate", str(checkpoint), "-i", str(source), "-o", str(output)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"{output}: 12 rows written, 12 of them errors, 0 were there already" in said
    assert "\n- line 1: cannot read the picture" in said and "\n- line 10: not JSON" in said
    assert "\n- and more, all in that file\n" in said
    assert said.endswith("\nno request was left to send, so the engine was not started\n")
    rows = read_rows(output)
    assert [row["line"] for row in rows] == list(range(1, 13)) and all(row["error"] for row in rows)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert main([*words, "--resume"]) == 1 and len(read_rows(output)) == 12
    assert "9 of them errors, 3 were there already" in capsys.readouterr().err
    write_batch(source, 1)
    with pytest.raises(AssertionError, match="was started"):
        main([*words[:-1], str(tmp_path / "again.jsonl")])


@pytest.mark.slow
def test_generate_kill_and_resume(checkpoint: Path, tmp_path: Path) -> None:
    """The engine dies, then kill -9 in the middle: with --resume no line lost, none twice."""
    source = write_batch(tmp_path / "in.jsonl", 600, ignore_eos=True, max_tokens=24)
    with source.open("a") as file:
        file.write("nonsense\n")
    output = tmp_path / "out.jsonl"
    words = command(checkpoint, "-i", source, "-o", output)
    with start(words, output, rows=40) as process:
        os.kill(engine_of(process.pid), signal.SIGKILL)
        assert process.wait(timeout=300) == 1
    assert "run it again with --resume" in output.with_suffix(".log").read_text()
    before = output.read_bytes().count(b"\n")
    with start([*words, "--resume"], output, rows=before + 40) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = output.read_bytes().count(b"\n")
    assert 80 < before < 601
    done = subprocess.run(
        [*words, "--resume"], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1, done.stderr[-2000:]  # the line that is nonsense
    assert "1 of them errors" in done.stderr and f"{before} were there already" in done.stderr
    rows = read_rows(output)
    assert sorted(row["line"] for row in rows) == list(range(1, 602))
    assert sum(row["error"] is not None for row in rows) == 1


@pytest.mark.slow
def test_generate_from_a_folder_to_csv(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        tiny_llava.picture(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    output = tmp_path / "out.csv"
    done = subprocess.run(
        command(checkpoint, "-i", folder, "--prompt", "What?", "--max-tokens", "5", "-o", output),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stdout == "" and "\n- broken.png: " in done.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: row["custom_id"])
    assert [row["custom_id"] for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    assert rows.pop()["error"].startswith("broken.png: ")
    assert all(row["answer"] and not row["error"] for row in rows)
