"""The one reader of people's text files: JSON, JSON lines, CSV and captions.

UTF-8 is read, with a byte-order mark or without. Anything else is refused with the file, the line
and the byte, and before the first line is handed out, so that no work is begun that the end of
the file would stop. Nothing is guessed, and nothing is replaced.

Lines end with LF or CR LF. Other characters that Unicode counts as line ends (U+2028, U+0085, form
feed) are text: JSON allows them inside a string.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError

_MARK = "\ufeff"
_CHUNK = 1 << 20
_LONGEST_FIELD = 1 << 30  # characters; a picture may stand in a field as a data URL
_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

_BINARY = (
    (b"\x1f\x8b", "packed by gzip"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd"),
    (b"PK\x03\x04", "a zip file"),
    (b"PAR1", "a parquet file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
_GIVE_TEXT = "unpack it, or give a text file (a parquet file as hf:PATH)"


def check_utf8(path: Path) -> None:
    """UserError, with line and byte (both counted from 1), if a file is not text in UTF-8.

    Reads the whole file, a piece at a time.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, line = 0, 1  # bytes before the piece, and the line on which it begins
    with _opened(path) as file:
        piece = file.read(_CHUNK)
        for mark, kind in _BINARY:
            if piece.startswith(mark):
                raise UserError(f"{path} is {kind}, not text: {_GIVE_TEXT}")
        for mark, name in _MARKS:
            if piece.startswith(mark):
                raise _refusal(path, 1, 1, f"the file is text in {name}, not in UTF-8", name)
        looks_like = "UTF-16LE" if b"\0" in piece else "WINDOWS-1252"
        while True:
            held = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
            wrong = None
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                wrong = error.start - held, f"0x{error.object[error.start]:02X} is not UTF-8"
            zero = piece.find(b"\0")
            if zero >= 0 and (wrong is None or zero < wrong[0]):
                wrong = zero, "a zero byte, which text does not have"
            if wrong is not None:
                at, fault = wrong
                line += piece[: max(0, at)].count(b"\n")
                raise _refusal(path, line, done + at + 1, fault, looks_like)
            if not piece:
                return
            done += len(piece)
            line += piece.count(b"\n")
            piece = file.read(_CHUNK)


def _refusal(path: Path, line: int, byte: int, fault: str, encoding: str) -> UserError:
    return UserError(
        f"{path}, line {line}, byte {byte}: {fault}; convert the file to UTF-8: "
        f"iconv -f {encoding} -t UTF-8 {path.name} > NEW (if it is in {encoding})"
    )


def read_text(path: Path) -> str:
    """A whole file, line ends as they are, without its mark. UserError if it is not UTF-8."""
    check_utf8(path)
    with _opened(path) as file:
        return file.read().decode().removeprefix(_MARK)


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError if it cannot be read."""
    try:
        return parse_json(read_text(path))
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is not JSON ({error})") from None


def read_list(path: Path) -> list[Any] | None:
    """The value of a JSON file that is a list; None for a file whose text does not begin as one."""
    with _opened(path) as file:
        first = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    value = read_json(path) if first == b"[" else None
    return value if isinstance(value, list) else None


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError if it is none, or RecursionError if it is too deep.

    A key twice in one object and half a surrogate pair are errors too: programs differ in what
    they take such a text to be.
    """
    value = json.loads(text, object_pairs_hook=_object)
    if (half := _HALF_PAIR.search(text)) and _has_half_pair(value):
        raise ValueError(f"{half[0]} is half of a surrogate pair, which is no character")
    return value


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""Or one half of a whole one."""


def _has_half_pair(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1, without line end and mark.

    UserError before the first one if any of the file is not UTF-8.
    """
    check_utf8(path)
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            # A mark inside is what is left where two files were joined; it is no JSON, nor text.
            line = raw.decode().removeprefix(_MARK).rstrip("\r\n")
            if line.strip():
                yield number, line


@dataclass(frozen=True)
class CsvRow:
    """One row of a CSV file."""

    line: int
    """Its last line in the file, from 1."""
    fields: dict[str, str]
    """By column; a field that the row is too short for is empty."""
    surplus: tuple[str, ...] = ()
    """Fields beyond the columns: what follows a comma that was not quoted."""


def csv_columns(path: Path) -> list[str]:
    """The names in the first line. UserError if the file is not a CSV file in UTF-8."""
    check_utf8(path)
    columns = next(_csv_records(path), (0, []))[1]
    if twice := next((c for c in columns if columns.count(c) > 1), None):
        raise UserError(f"{path}: the column {twice!r} is there twice: name one of them otherwise")
    return columns


def csv_rows(path: Path) -> Iterator[CsvRow]:
    """The rows below the first line, blank ones apart.

    UserError before the first one if any of the file is not UTF-8, or a quote is not closed.
    """
    check_utf8(path)
    for _ in _csv_records(path):
        pass
    records = _csv_records(path)
    _, columns = next(records, (0, []))
    for line, record in records:
        padded = [*record, *[""] * (len(columns) - len(record))]
        yield CsvRow(
            line,
            dict(zip(columns, padded, strict=False)),
            tuple(record[len(columns) :]),
        )


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_LONGEST_FIELD)  # of the process; the default would refuse pictures
    with _opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)  # or an open quote swallows the rest of the file
        try:
            for record in reader:
                if record:
                    yield reader.line_num, record
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: not CSV ({error}): quote fields with commas, "
                'quotes or line ends, and write a quote inside as ""'
            ) from None


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
