"""What a batch reads and writes, without an engine."""

from __future__ import annotations

import base64
import csv
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.serving import batch_io
from qig_serve.serving.batch_io import Request
from qig_serve.serving.batch_results import Results

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
BAD = GOOD | {"custom_id": "bad"}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "not JSON"),
        (r'{"custom_id": "\ud800", "body": {}}', "half of a surrogate pair"),
        ([1, 2], "a JSON object is wanted, not list"),
        ({"body": {}}, "custom_id is missing"),
        ({"messages": []}, "string: write the messages into the body of a request, as OpenAI's"),
        (GOOD | {"custom_id": 3}, "custom_id is missing or not a string"),
        (BAD | {"method": "GET"}, "only POST"),
        (BAD | {"url": "http://elsewhere/"}, "does not start with /v1/"),
        (BAD | {"body": "x"}, "body is missing"),
        (BAD | {"body": {"stream": True}}, "stream is not possible"),
    ],
    ids=[
        "no-json",
        "half-a-pair",
        "list",
        "no-id",
        "sample",
        "id-is-a-number",
        "method",
        "url",
        "body",
        "stream",
    ],
)
def test_bad_line_is_an_error_row_with_its_number(tmp_path: Path, row: Any, message: str) -> None:
    path = lines(tmp_path / "in.jsonl", GOOD, "", row, GOOD | {"custom_id": "b"})
    first, bad, last = batch_io.read_requests(path, None, {})
    assert first.error is None and last.custom_id == "b" and last.line == 4
    assert bad.line == 3 and bad.body is None and message in (bad.error or "")
    written = batch_io.error_row(bad, bad.error or "")
    assert written["error"]["message"].startswith("line 3: ") and written["response"] is None


def test_bytes_that_are_no_text_are_refused_before_the_work(tmp_path: Path) -> None:
    """A file that is not UTF-8 throughout would have its good lines read as other words."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match=r"in\.jsonl, line 2, byte \d+: 0xFF is not UTF-8"):
        next(batch_io.read_requests(path, None, {}))


def test_a_list_of_requests_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps([{"custom_id": "a", "body": {}}], indent=1))
    with pytest.raises(UserError, match=r"r\.jsonl is one JSON list: write one request per line"):
        next(batch_io.read_requests(tmp_path / "r.jsonl", None, {}))


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".trash/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [r.custom_id for r in batch_io.read_requests(tmp_path, "What?", {})] == ["a.png"]
    assert batch_io.count_requests(tmp_path) == 1


def test_what_is_no_picture_file(tmp_path: Path) -> None:
    """A device has no end."""
    for name in ("/dev/zero", ".", ""):
        with pytest.raises(ValueError, match="cannot read the picture .*: it is no file"):
            batch_io.embed_pictures(body(name), tmp_path)


def test_base64_in_lines(tmp_path: Path) -> None:
    whole, broken = body("data:image/png;base64,AAAA"), body("data:image/png;base64, AA\r\nAA\n")
    assert batch_io.embed_pictures(broken, tmp_path) == whole


def test_repeated_custom_id_is_an_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", GOOD, GOOD, GOOD | {"method": "GET"})
    first, *others = batch_io.read_requests(path, None, {})
    assert first.error is None
    for other in others:
        assert other.error == "custom_id 'a' was used by an earlier line"
        assert other.custom_id is None


def test_defaults_do_not_override(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", GOOD | {"body": {"max_tokens": 3}})
    (request,) = batch_io.read_requests(path, None, {"max_tokens": 9, "model": "m"})
    assert request.body == {"max_tokens": 3, "model": "m"}


def test_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    requests = list(batch_io.read_requests(tmp_path, "What?", {}))
    assert [r.custom_id for r in requests] == ["a.jpg", "b.PNG", "sub/c.webp"]
    assert batch_io.error_row(requests[2], "why")["error"]["message"] == "sub/c.webp: why"
    assert batch_io.count_requests(tmp_path) == 3
    with pytest.raises(UserError, match="--prompt"):
        next(batch_io.read_requests(tmp_path, None, {}))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('image,prompt\na.png,"One, or\ntwo?"\nb.png,\n')
    good, bad = batch_io.read_requests(path, None, {})
    assert good.body is not None
    assert good.body["messages"][0]["content"][1]["text"] == "One, or\ntwo?"
    assert bad.error == "image or prompt is empty"
    assert batch_io.count_requests(path) == 2
    path.write_text("picture,prompt\n")
    with pytest.raises(UserError, match="no column image"):
        next(batch_io.read_requests(path, None, {}))


def body(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}


def test_pictures_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    embedded = batch_io.embed_pictures(body("a.jpg"), tmp_path)["messages"][0]["content"][0]
    expected = "data:image/jpeg;base64," + base64.b64encode(b"picture").decode()
    assert embedded["image_url"] == {"url": expected, "detail": "low"}
    file_url = batch_io.embed_pictures(body("file://a.jpg"), tmp_path)
    assert file_url["messages"][0]["content"][0] == embedded
    for url in ("data:image/png;base64,AA", "https://example.org/a.jpg"):
        assert batch_io.embed_pictures(body(url), tmp_path) == body(url)
    with pytest.raises(ValueError, match=r"gone\.png: No such file"):
        batch_io.embed_pictures(body("gone.png"), tmp_path)


@pytest.mark.parametrize(
    "messages",
    [None, "x", [1], [{"content": [None, {"image_url": 3}]}]],
    ids=["none", "text", "numbers", "odd-parts"],
)
def test_odd_messages_are_left_to_the_server(tmp_path: Path, messages: Any) -> None:
    assert batch_io.embed_pictures({"messages": messages}, tmp_path) == {"messages": messages}


def row(line: int, text: str = "yes") -> dict[str, Any]:
    answer = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 1}}
    return batch_io.result_row(Request(line, f"id{line}"), 200, "r", answer)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_resume_after_a_kill_loses_and_repeats_nothing(tmp_path: Path, suffix: str) -> None:
    """Whatever byte the file was cut at, whole rows are kept and the torn one is written again."""
    whole = tmp_path / f"whole.{suffix}"
    results = Results(whole, resume=False)
    for i in range(1, 4):
        results.write(row(i, f'line {i}\nsaid "ä"'))
    results.close()
    content = whole.read_bytes()
    for cut in range(0, len(content) + 1, 3):
        torn = tmp_path / f"torn.{suffix}"
        torn.write_bytes(content[:cut])
        results = Results(torn, resume=True)
        for i in range(1, 4):
            if not results.has(Request(i, f"id{i}")):
                results.write(row(i, f'line {i}\nsaid "ä"'))
        results.close()
        assert torn.read_bytes() == content, cut


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_finished_requests_are_known_by_their_id(tmp_path: Path, suffix: str) -> None:
    """A picture that joins the folder before the run is resumed moves the lines of the others."""
    results = Results(tmp_path / f"out.{suffix}", resume=False)
    results.write(row(1))
    results.write(batch_io.error_row(Request(3, None), "not JSON"))
    results.close()
    results = Results(tmp_path / f"out.{suffix}", resume=True)
    assert results.has(Request(2, "id1")) and not results.has(Request(1, "new"))
    assert results.has(Request(3, None)) and not results.has(Request(1, None))
    results.close()


def test_csv_output(tmp_path: Path) -> None:
    results = Results(tmp_path / "out.csv", resume=False)
    results.write(row(1, "a\nb"))
    results.write(batch_io.error_row(Request(2, None), "no"))
    results.close()
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"custom_id": "id1", "line": "1", "answer": "a\nb", "error": ""}
    assert rows[1]["error"] == "line 2: no"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_full_disk_leaves_whole_rows(tmp_path: Path, suffix: str) -> None:
    """What was written of the row without room is taken back."""
    results = Results(tmp_path / f"out.{suffix}", resume=False)
    results.write(row(1))
    whole = results.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written further: .* --resume"):
            results.write(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results.close()
    assert results.path.read_bytes() == whole


def test_prompt_beside_requests_that_say_theirs(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", GOOD)
    with pytest.raises(UserError, match="--prompt is for a CSV file or a folder"):
        next(batch_io.read_requests(path, "What?", {}))


def test_no_tokens_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(tmp_path), "-i", "in.jsonl", "-o", "out.jsonl", "--max-tokens", "0"]
    assert main(words) == 2
    assert "--max-tokens is 0: an answer has at least one token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"message": {"content": "a"}}, {"text": "b"}]}, '["a", "b"]'),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"id": 1}]}}]}, '[{"id": 1}]'),
        ({"content": [{"type": "text", "text": "a"}, {"type": "tool_use"}]}, "a"),
        ({"output": [{"type": "reasoning"}, {"content": [{"text": "a"}]}]}, "a"),
        ({"choices": []}, ""),
    ],
    ids=["two-choices", "tool-calls", "messages", "responses", "none"],
)
def test_text_of_other_answers(body: dict[str, Any], text: str) -> None:
    """In a CSV file an answer that is not found would look like an empty one."""
    answered = batch_io.result_row(Request(1, "a"), 200, "r", body)
    assert batch_io.answer_text(answered) == text


def test_pictures_of_responses_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    part = {"type": "input_image", "image_url": "a.jpg"}
    asked = {"input": [{"role": "user", "content": [part]}]}
    (turn,) = batch_io.embed_pictures(asked, tmp_path)["input"]
    assert turn["content"][0]["image_url"].startswith("data:image/jpeg;base64,")
    assert batch_io.embed_pictures({"input": "words"}, tmp_path) == {"input": "words"}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_run_that_answers_nothing_leaves_no_file(tmp_path: Path, suffix: str) -> None:
    """As where vLLM does not start: the next run would be told that its output exists."""
    path = tmp_path / f"out.{suffix}"
    Results(path, resume=False).close()
    assert not path.exists()
    path.touch()
    Results(path, resume=True).close()
    assert path.exists()  # which was there before


def test_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    path = lines(tmp_path / "out.jsonl", row(1))
    with pytest.raises(UserError, match="--resume"):
        Results(path, resume=False)
    lines(path, {"something": "else"})
    with pytest.raises(UserError, match="not a row of this command's output"):
        Results(path, resume=True)
    assert json.loads(path.read_text()) == {"something": "else"}
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        Results(tmp_path, resume=False)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("text", ["my notes", '{"answers": 5}'])
def test_what_is_no_beginning_of_a_row_is_not_taken_for_a_torn_one(
    tmp_path: Path, suffix: str, text: str
) -> None:
    path = tmp_path / f"out.{suffix}"
    path.write_text(text)  # without a line end, as if it had been cut
    with pytest.raises(UserError, match="not a row of this command's output"):
        Results(path, resume=True)
    assert path.read_text() == text


def test_refused_request_says_why() -> None:
    refused = batch_io.result_row(Request(5, "x"), 400, "r", {"error": {"message": "too long"}})
    assert refused["error"] == {"code": "400", "message": "line 5: too long"}
    assert refused["response"]["status_code"] == 400


@pytest.mark.parametrize("body", ["", {"detail": "Not Found"}])
def test_what_the_router_refuses(body: Any) -> None:
    refused = batch_io.result_row(Request(5, "x", "/v1/nothing"), 404, "r", body)
    message = "line 5: POST /v1/nothing is answered with 404 Not Found"
    assert refused["error"] == {"code": "404", "message": message}
