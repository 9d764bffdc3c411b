"""Calibration samples from a Hugging Face dataset: hf:NAME?split=...&image=...&answer=...

NAME is a dataset of the hub, a folder (of files, or written by `save_to_disk`), or a parquet file.
A row's picture may be one, or a list of them: decoded, encoded bytes (or their base64 text, or a
data URL), {"bytes", "path"}, or a path from the dataset's folder. A caption may be a list: the
first counts. Without such a column the turns of "messages" or "conversations", or of the forms of
turns.py, are read (records.py), with the pictures of "image" or "images"; without turns, "question"
and "answer", or "question" and "chosen". Rows without a picture, with neither caption nor turns, or
whose answer is marked as not wanted, are left out, and counted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.records import (
    PICTURE_KEYS,
    parse_record,
    picture_path,
    resolve_picture,
)
from qig_serve.samples import ImageSource, Sample, load_image
from qig_serve.turns import FORMS, TURNS, has_turns, is_rejected, with_turns

CAPTION_QUESTION = "Describe the image."
_OPTIONS = {"split": "train", "image": "image", "answer": "caption", "question": ""}
_IMAGE_COLUMNS = ("image", "images")
_PICTURE_COLUMN = re.compile("image|img|picture|photo|pixel", re.IGNORECASE)
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk0)[A-Za-z0-9+/\s]{32,}=*\s*")
"""Text of JPEG, PNG, WebP, GIF and BMP."""
_MAP = "hf:NAME?image=COLUMN&question=COLUMN&answer=COLUMN"
_WAY_OUT = (
    "give a dataset of the hub (with a network), a folder that datasets saved, or a parquet file: "
    "hf:NAME, hf:FOLDER or hf:FILE.parquet"
)
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves of a dataset, and of several splits."""


def hugging_face(source: str, n: int, seed: int, text_only: bool, notes: list[str]) -> list[Sample]:
    """`n` samples, streamed, so that only what is used is fetched; `notes`: what was left out.

    With `text_only` rows without a picture are samples too.

    UserError when the dataset cannot be read, and for a row that cannot be used and is not empty.
    """
    name, options = _parse(source)
    samples: list[Sample] = []
    empty: dict[str, int] = {}
    # Rows with nothing to use are passed, though not a whole dataset of them.
    most = n + max(1000, n)
    for i, row in enumerate(_rows(source, name, options, seed, max(1000, n), most)):
        where = f"{source}, row {i} in the order of seed {seed}"
        sample: Sample | str
        if _has_turns(row, options):
            sample = _conversation(row, options, where, f"{name}-{i}", _folder(name), text_only)
        else:
            named = _with_answers(row, options)
            _check_columns(source, row, named)
            sample = _sample(row, named, where, f"{name}-{i}", _folder(name))
            sample = _missing(sample, text_only) or sample
        if isinstance(sample, str):
            empty[sample] = empty.get(sample, 0) + 1
        else:
            samples.append(sample)
        if len(samples) == n:
            break
    left_out = ", ".join(f"{count} without {what}" for what, count in sorted(empty.items()))
    if empty and not samples:
        raise UserError(
            f"{source}: no row can be used ({left_out}): name the columns that hold pictures and "
            f"captions, as {_MAP}"
        )
    if empty:
        notes.append(f"rows of {source} were left out: {left_out}")
    return samples


def _parse(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix("hf:").partition("?")
    options: dict[str, str] = {}
    if not name:
        raise UserError(f"{source} names no dataset: {_WAY_OUT}")
    for key, value in parse_qsl(query, keep_blank_values=True):
        if not value and key != "question":
            raise UserError(
                f"{source}: the option {key!r} is empty: name a column, or leave it out"
            )
        if key not in (*_OPTIONS, "config"):
            raise UserError(
                f"{source}: unknown option {key!r}; known: {', '.join(_OPTIONS)}, config"
            )
        if key in options:
            raise UserError(f"{source}: the option {key!r} is given twice: give it once")
        options[key] = value
    return name, options


def _column(options: Mapping[str, str], key: str) -> str:
    return options.get(key, _OPTIONS[key])


def _folder(name: str) -> Path:
    """Where relative paths of a dataset begin."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else Path()


def _rows(
    source: str, name: str, options: Mapping[str, str], seed: int, buffer: int, most: int
) -> Iterator[dict[str, Any]]:
    """The first `most` rows in the order of the seed; UserError for all that datasets raises."""
    require("datasets", f"{source} (--calib names other data)")
    import datasets

    try:
        stream = _open(datasets, name, options)
        labels = {
            column: kind.names
            for column, kind in (stream.features or {}).items()
            if isinstance(kind, datasets.ClassLabel)
        }
        for row in stream.shuffle(seed=seed, buffer_size=buffer).take(most):
            for column, names in labels.items():
                label = row[column]
                row[column] = None if label is None or label < 0 else names[label]
            yield row
    except UserError:
        raise
    except Exception as error:  # of the hub's client, of pyarrow, of Pillow, and its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} cannot be read ({reason.rstrip('.')}): {_WAY_OUT}") from None


def _open(datasets: Any, name: str, options: Mapping[str, str]) -> Any:
    split, path = _column(options, "split"), Path(name)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    if (
        path.suffix
        and not path.is_dir()
        and (path.is_absolute() or path.is_file() or path.suffix == ".parquet")
    ):
        if not path.is_file():
            raise UserError(f"hf:{name}: the file {path} does not exist: {_WAY_OUT}")
        if path.suffix != ".parquet":
            raise UserError(
                f"hf:{name}: of single files only parquet is read: give a parquet file, or "
                "CSV and JSON without hf:"
            )
    saved_here = any((path / file).is_file() for file in _SAVED)
    if "config" in options and (saved_here or path.is_file()):
        raise UserError(f"hf:{name} has no configurations: leave out config={options['config']}")
    if saved_here:
        try:
            saved = datasets.load_from_disk(name)
        except IndexError:  # what datasets makes of a table without rows
            raise UserError(f"the calibration data hf:{name} holds an empty dataset") from None
        if isinstance(saved, dict):
            if split not in saved:
                raise UserError(f"{name} has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        elif "split" in options and split != str(saved.split or "train"):
            raise UserError(f"{name} is one dataset without splits: leave out split={split}")
        return saved.with_format(None).to_iterable_dataset()
    if path.suffix == ".parquet" and path.is_file():
        return datasets.load_dataset("parquet", data_files=name, split=split, streaming=True)
    if path.is_dir():
        name = str(path.resolve())  # "." is no name to datasets
    return datasets.load_dataset(name, options.get("config"), split=split, streaming=True)


def _check_columns(source: str, row: Mapping[str, Any], options: Mapping[str, str]) -> None:
    columns = [_column(options, key) for key in ("image", "answer", "question")]
    missing = [c for c in columns if c and c not in row]
    if missing:
        raise UserError(
            f"{source}: no column {missing[0]!r}; the columns are {', '.join(row)}. "
            f"Map them as {_MAP}, or name a column of turns messages or conversations, or two "
            "prompt and completion, or prompt and chosen"
        )


def _with_answers(row: Mapping[str, Any], options: Mapping[str, str]) -> Mapping[str, str]:
    """The options, with question and answer where a row has both, and no caption to go before."""
    theirs = {"question": "question", "answer": "answer" if "answer" in row else "chosen"}
    named = theirs.keys() & options.keys() or _OPTIONS["answer"] in row
    return options if named or not set(theirs.values()) <= row.keys() else {**options, **theirs}


def _has_turns(row: Mapping[str, Any], options: Mapping[str, str]) -> bool:
    """Whether the row is a conversation: captions and questions that are named go first."""
    named = "answer" in options or "question" in options or _OPTIONS["answer"] in row
    return not named and has_turns({c: _list_of_turns(row[c]) for c in row})


def _conversation(
    row: Mapping[str, Any],
    options: Mapping[str, str],
    where: str,
    identifier: str,
    folder: Path,
    text_only: bool,
) -> Sample | str:
    """The sample of a row's turns, or what it lacks to be one."""
    columns = [c for c in _IMAGE_COLUMNS if c in row]
    if "image" in options:
        columns = [options["image"]]
        _check_columns(where, row, {"image": columns[0], "answer": "", "question": ""})
    found = {c: _pictures(row[c], f"{where}, column {c}", folder) for c in columns}
    held = [c for c in columns if found[c]]
    if len(held) > 1:
        raise UserError(
            f"{where}: pictures in the columns {' and '.join(held)}: name one as ?image=COLUMN"
        )
    pictures = [_load(p, f"{where}, column {c}") for c in held for p in found[c]]
    known = bool(held) or "image" in options
    record: dict[str, Any] = {}
    for column, value in row.items():
        if column in (*TURNS, *FORMS):
            record[column] = _plain(_list_of_turns(value))
        elif column not in columns and not (known and _PICTURE_COLUMN.search(column)):
            # Where the pictures are known, names and sizes of them are no loss.
            record[column] = _plain(value)
    if is_rejected(record):
        return "a wanted answer (label or kto_tag is false)"
    record = with_turns({k: v for k, v in record.items() if v or k not in TURNS}, where)
    record = {"id": identifier} | {k: v for k, v in record.items() if v is not None}
    turns = [turn for column in TURNS for turn in record.get(column) or []]
    if not turns:
        return "turns"
    shown = any(map(_shows, turns))
    if columns and not held and not text_only and not shown:
        return "a picture"  # whatever marks there are
    other = next((c for c in record if c not in TURNS and _PICTURE_COLUMN.search(c)), None)
    if other and not columns and not shown and not isinstance(record[other], (int, float)):
        raise UserError(
            f"{where}: the column {other} is not read: name it, as hf:NAME?image={other}"
        )
    sample = parse_record(record, where, folder, 0, pictures if columns else None)
    for message in sample.messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = _load(part["image"], where)
    return sample if sample.images or text_only else "a picture"


def _list_of_turns(value: Any) -> Any:
    """Turns that datasets stores as lists of their fields, as a list of turns."""
    if not isinstance(value, dict):
        return value
    fields = [field for field in value.values() if isinstance(field, list)]
    if len(fields) < len(value) or len({len(field) for field in fields}) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*fields, strict=True)]


def _shows(turn: Any) -> bool:
    """Whether a turn itself holds a picture."""
    content = turn.get("content") if isinstance(turn, dict) else None
    parts = content if isinstance(content, list) else []
    return any(part.get(key) for part in parts if isinstance(part, dict) for key in PICTURE_KEYS)


def _plain(value: Any) -> Any:
    """A cell as JSON would have it: without keys that other rows have, pictures as one value."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"bytes", "path"}:
        return value["bytes"] or value["path"]
    return {k: _plain(v) for k, v in value.items() if v is not None} or None


def _sample(
    row: Mapping[str, Any], options: Mapping[str, str], where: str, identifier: str, folder: Path
) -> Sample:
    """The sample of a row, with whatever the row has of it."""
    question: str | None = CAPTION_QUESTION
    names = {key: _column(options, key) for key in ("image", "answer", "question")}
    if names["question"]:
        question = _text(row[names["question"]], f"{where}, column {names['question']}")
    answer = _text(row[names["answer"]], f"{where}, column {names['answer']}")
    column = f"{where}, column {names['image']}"
    content: list[dict[str, Any]] = [
        {"type": "image", "image": _load(image, column)}
        for image in _pictures(row[names["image"]], column, folder)
    ]
    content.append({"type": "text", "text": question or ""})
    return Sample(identifier, "caption", ({"role": "user", "content": content},), answer)


def _missing(sample: Sample, text_only: bool) -> str | None:
    """What a sample lacks to be one; None where it lacks nothing."""
    if not sample.images and not text_only:
        return "a picture"
    if not sample.question:
        return "a question"
    return None if sample.answer else "a caption"


def _load(image: ImageSource, where: str) -> Image.Image:
    """The picture in memory; UserError that names the row."""
    try:
        return load_image(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _text(value: Any, where: str) -> str | None:
    """The first text of a cell; None where there is none. Numbers are texts."""
    if isinstance(value, (list, tuple)):
        return next((t for t in (_text(item, where) for item in value) if t is not None), None)
    if isinstance(value, float) and math.isnan(value):  # an empty cell that passed through pandas
        return None
    if isinstance(value, (int, float)):
        return str(value)
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise UserError(
        f"{where}: a text or a list of texts is wanted, not {type(value).__name__} (turns in a "
        "column messages or conversations are read without answer= and question=)"
    )


def _pictures(value: Any, where: str, folder: Path) -> list[ImageSource]:
    """The pictures of a cell, in their order."""
    if value is None or value == "" or value == b"":
        return []
    if isinstance(value, (list, tuple)):
        return [picture for item in value for picture in _pictures(item, where, folder)]
    if isinstance(value, (Image.Image, bytes)):
        return [value]
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        return _pictures(value.get("bytes") or value.get("path"), where, folder)
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return [resolve_picture(value, where, folder)]
        if _BASE64.fullmatch(value):
            return [resolve_picture(f"data:,{value}", where, folder)]
        path = picture_path(value, folder)
        if path is None or not os.path.isfile(path):
            raise UserError(
                f"{where}: {value[:80]!r} is no picture and no file below {folder.absolute()}: "
                "name a column that holds the pictures, or a local copy of the dataset"
            )
        return [path]
    raise UserError(
        f"{where}: a picture is wanted, its bytes or path, or a list of them, not "
        f"{type(value).__name__}: make pictures of arrays with cast_column(..., datasets.Image())"
    )
