"""The output file of a batch: rows of batch_io.py, written as they come and taken up again."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qig_serve.errors import UserError
from qig_serve.serving.batch_io import Request, answer_text

CSV_COLUMNS = ("custom_id", "line", "answer", "error")


class Results:
    """The output file, written a row at a time; JSONL, or CSV if its name ends so."""

    def __init__(self, path: Path, resume: bool) -> None:
        """UserError if the file exists and `resume` is not asked for, or cannot be written."""
        self.path = path
        self.kind: Literal["csv", "jsonl"] = "csv" if path.suffix.lower() == ".csv" else "jsonl"
        self._answered: set[str] = set()  # custom_ids
        self._refused: set[int] = set()  # lines that have none
        self._began = not path.exists()
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
        if path.exists() and not resume:
            raise UserError(f"{path} exists: continue it with --resume, or name another file")
        try:
            if path.exists():
                self._take_up()
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        if self.kind == "csv" and self._file.tell() == 0:
            self._append(_csv_line(CSV_COLUMNS))

    def has(self, request: Request) -> bool:
        """Whether a run before this one wrote the request's row."""
        if request.custom_id is None:
            return request.line in self._refused
        return request.custom_id in self._answered

    def _note(self, custom_id: str | None, line: int) -> None:
        if custom_id:
            self._answered.add(custom_id)
        else:
            self._refused.add(line)

    def _take_up(self) -> None:
        """Note what has a row, and cut off a row that a killed run left unfinished."""
        whole = 0
        with self.path.open("rb") as file:
            begins = _csv_line(CSV_COLUMNS) if self.kind == "csv" else '{"id": "batch_req_'
            first = file.read(len(begins))
            file.seek(0)
            if self.kind == "csv":
                whole = self._read_csv_rows(file.read())
            else:
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    try:
                        row = json.loads(raw)
                        self._note(row["custom_id"], int(row["line"]))
                    except (ValueError, KeyError, TypeError):
                        raise self._not_ours(whole) from None
                    whole += len(raw)
        if whole == 0 and not begins.encode().startswith(first):
            raise self._not_ours(whole)
        with self.path.open("rb+") as file:
            file.truncate(whole)

    def _not_ours(self, byte: int) -> UserError:
        return UserError(
            f"{self.path}: byte {byte}: not a row of this command's output; --resume continues "
            "only a file that it wrote"
        )

    def _read_csv_rows(self, raw: bytes) -> int:
        """Rows end with CR LF outside quotes; those are the only line ends counted."""
        whole, quoted = 0, False
        for i, byte in enumerate(raw):
            if byte == ord('"'):
                quoted = not quoted
            elif byte == ord("\n") and not quoted:
                try:
                    row = next(csv.reader([raw[whole : i + 1].decode()]), [])
                    if whole:
                        self._note(row[0], int(row[1]))
                except (ValueError, LookupError, csv.Error):
                    raise self._not_ours(whole) from None
                if whole == 0 and tuple(row) != CSV_COLUMNS:
                    raise UserError(f"{self.path}: not this command's output: other columns")
                whole = i + 1
        return whole

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it is the operating system's when this returns, and survives a kill.

        UserError if it cannot be written; rows before it are whole then.
        """
        if self.kind == "csv":
            error = row["error"]["message"] if row["error"] else ""
            self._append(_csv_line([row["custom_id"], row["line"], answer_text(row), error]))
        else:
            self._append(json.dumps(row, ensure_ascii=False) + "\n")
        self._began = False

    def _append(self, text: str) -> None:
        left = memoryview(text.encode())
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._file.fileno(), whole)
            raise UserError(
                f"{self.path} cannot be written further: {error.strerror}; its rows are whole: "
                "make room, and run it again with --resume"
            ) from None

    def close(self) -> None:
        """Close the file; one that this run began, and has put no row into, is taken away."""
        self._file.close()
        if self._began:
            self.path.unlink(missing_ok=True)


def _csv_line(fields: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(fields)
    return line.getvalue()
