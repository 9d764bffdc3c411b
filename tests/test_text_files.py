"""People's text files: what is read, and how what is not UTF-8 is refused."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qig_serve import text_files
from qig_serve.errors import UserError
from qig_serve.evaluate import read_outputs
from qig_serve.records import read_samples
from qig_serve.samples import sample_from_parts
from qig_serve.serving import batch_io
from qig_serve.serving.batch_results import Results

MARK = b"\xef\xbb\xbf"
WORDS = "café\u2028second\u0085third\x0cfourth"
"""Line ends of Unicode, which are text in JSON and CSV."""

QUESTION = {"role": "user", "content": [{"type": "text", "text": WORDS}]}


def sample_line(text: str) -> str:
    image = {"type": "image_url", "image_url": {"url": "red.png"}}
    content = [image, {"type": "text", "text": text}]
    sample = {"id": "1", "messages": [{"role": "user", "content": content}], "answer": "é"}
    return json.dumps(sample, ensure_ascii=False)


def request_line(text: str) -> str:
    body = {"messages": [{"role": "user", "content": text}]}
    return json.dumps({"custom_id": "a", "body": body}, ensure_ascii=False)


def first_question(path: Path) -> str:
    return read_samples(path)[0].question


def first_body(path: Path) -> str:
    (request,) = batch_io.read_requests(path, None, {})
    assert request.error is None and batch_io.count_requests(path) == 1
    content = request.body["messages"][0]["content"]  # type: ignore[index]
    return content if isinstance(content, str) else content[1]["text"]


def first_output(path: Path) -> str:
    sample = sample_from_parts("1", "all", b"", "", None)
    (output,) = read_outputs(path, [sample], "of the questions")
    return str(output)


READERS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "samples": ("s.jsonl", sample_line(WORDS) + "\n", first_question),
    "batch-jsonl": ("b.jsonl", request_line(WORDS) + "\n", first_body),
    "batch-csv": ("b.csv", f'image,prompt\r\nred.png,"{WORDS}"\r\n', first_body),
    "reference": (
        "r.json",
        json.dumps(
            {
                "evaluation_sha256": "of the questions",
                "answers": [{"id": "1", "output": WORDS}],
            },
            ensure_ascii=False,
        ),
        first_output,
    ),
}


@pytest.fixture(params=READERS)
def reader(request: Any, tmp_path: Path) -> tuple[Path, str, Callable[[Path], str]]:
    """A file to be written, its text, and what reads it."""
    name, text, read = READERS[request.param]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path / name, text, read


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
def test_utf8_is_read_and_its_line_ends_are_text(reader: Any, mark: bytes) -> None:
    path, text, read = reader
    path.write_bytes(mark + text.encode())
    assert read(path) == WORDS


@pytest.mark.parametrize(
    ("encoding", "fault"),
    [
        ("cp1252", r"line {n}, byte \d+: 0xE9 is not UTF-8; .*iconv -f WINDOWS-1252"),
        ("utf-16", "line 1, byte 1: the file is text in UTF-16, not in UTF-8; .*iconv -f UTF-16 "),
        ("utf-32", "line 1, byte 1: the file is text in UTF-32, not in UTF-8; .*iconv -f UTF-32 "),
        ("utf-16-le", r"line 1, byte 2: a zero byte, .*iconv -f UTF-16LE"),
        ("utf-16-be", r"line 1, byte 1: a zero byte, "),
    ],
    ids=["windows-1252", "utf-16", "utf-32", "utf-16-le", "utf-16-be"],
)
def test_anything_else_is_refused_with_its_place(reader: Any, encoding: str, fault: str) -> None:
    path, text, read = reader
    if encoding == "cp1252":
        text = text.replace("\u2028", " ").replace("\u0085", " ")
    path.write_bytes(text.encode(encoding))
    line = 1 + text[: text.index("é")].count("\n")
    with pytest.raises(UserError, match=fault.format(n=line)) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("reader_name", ["samples", "batch-jsonl", "batch-csv"])
def test_a_fault_at_the_end_is_found_before_the_first_line(
    reader_name: str, tmp_path: Path
) -> None:
    name, text, _ = READERS[reader_name]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    path = tmp_path / name
    path.write_bytes(text.encode() * 3 + b"caf\xe9\n")
    with pytest.raises(UserError, match=rf"byte {len(text.encode()) * 3 + 4}: 0xE9"):
        read_samples(path, 1) if reader_name == "samples" else next(
            batch_io.read_requests(path, None, {})
        )


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4, 5])
def test_places_are_right_across_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """A character, or a fault, may lie on the seam of two pieces."""
    monkeypatch.setattr(text_files, "_CHUNK", 4)
    path = tmp_path / "a.txt"
    good = "x" * before + "é€😀\n" * 2
    path.write_bytes(good.encode())
    assert text_files.read_text(path) == good
    for fault in (b"\xe2\x82x", b"\x80", b"\xff", b"\0"):
        path.write_bytes(good.encode() + fault)
        place = f"line 3, byte {len(good.encode()) + 1}: "
        with pytest.raises(UserError, match=place):
            text_files.check_utf8(path)
    path.write_bytes(good.encode() + "€".encode()[:2])  # cut short
    with pytest.raises(UserError, match=f"line 3, byte {len(good.encode()) + 1}: 0xE2"):
        text_files.check_utf8(path)


def test_lines_have_the_numbers_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(MARK + b"one\r\n\r\n  \ntwo\x0b\n" + MARK + b"three")
    assert list(text_files.lines(path)) == [(1, "one"), (4, "two\x0b"), (5, "three")]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist"):
        text_files.read_text(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        text_files.read_text(tmp_path)


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(MARK + b'a,b\r\n1,"2\n3"\r\n\r\n4\r\n5,6,7,8\r\n')
    assert text_files.csv_columns(path) == ["a", "b"]
    rows = list(text_files.csv_rows(path))
    assert [row.fields for row in rows] == [
        {"a": "1", "b": "2\n3"},
        {"a": "4", "b": ""},
        {"a": "5", "b": "6"},
    ]
    assert [row.line for row in rows] == [3, 5, 6] and rows[2].surplus == ("7", "8")
    path.write_bytes(b"")
    assert text_files.csv_columns(path) == [] and list(text_files.csv_rows(path)) == []


def test_a_picture_fits_into_a_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('image\n"data:image/png;base64,' + "A" * 300_000 + '"')
    (row,) = text_files.csv_rows(path)
    assert len(row.fields["image"]) > 300_000


def test_an_open_quote_does_not_swallow_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('image,prompt\na.png,"what is it?\nb.png,and this?\n')
    with pytest.raises(UserError, match=r"a\.csv, line 3: not CSV \(unexpected end of data\)"):
        next(text_files.csv_rows(path))


def test_an_unquoted_comma_is_an_error_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,prompt\na.png,how many, and why?\nb.png,fine\n")
    bad, good = batch_io.read_requests(path, None, {})
    assert bad.line == 2 and "' and why?' belongs to no column" in (bad.error or "")
    assert good.error is None


def test_pictures_are_named_alike_in_samples_and_batches(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a folder" / "red.png")
    absolute = (tmp_path / "a folder" / "red.png").as_posix()
    for url in (
        "a folder/red.png",
        "file://a%20folder/red.png",
        absolute,
        "file://" + absolute.replace(" ", "%20"),
        "file://localhost" + absolute.replace(" ", "%20"),
    ):
        image = {"type": "image_url", "image_url": {"url": url}}
        message = {"role": "user", "content": [image]}
        path = tmp_path / "s.jsonl"
        path.write_text(json.dumps({"messages": [message]}))
        (found,) = read_samples(path)[0].images
        assert os.path.samefile(found, absolute), url  # type: ignore[arg-type]
        for form in ({"url": url}, url):
            part = {"type": "image_url", "image_url": form}
            body = {"messages": [{"role": "user", "content": [part]}]}
            embedded = batch_io.embed_pictures(body, tmp_path)
            sent = embedded["messages"][0]["content"][0]["image_url"]
            sent = sent["url"] if isinstance(sent, dict) else sent
            assert sent.startswith("data:image/png;base64,"), url


@pytest.mark.parametrize("content", [b"custom_id,line,answer,error\r\ncaf\xe9,1,,\r\n", b"a\r\n"])
def test_an_output_that_was_saved_in_another_form_is_not_continued(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"out\.csv: .*not .*this command's output"):
        Results(path, resume=True)


def test_written_files_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "prompt"], ["a.png", WORDS + ' "quoted", \r\n']])
    (row,) = text_files.csv_rows(path)
    assert row.fields["prompt"] == WORDS + ' "quoted", \r\n'
