"""Calibration samples from a Hugging Face dataset: hf:NAME?split=...&image=...&answer=...

NAME is a dataset of the hub, a folder (of files, or written by `save_to_disk`), or a parquet file.
A row's picture may be one, or a list of them: decoded, encoded bytes, {"bytes", "path"}, or a path
from the dataset's folder. A caption may be a list: the first counts. Rows without a picture
or a caption are left out, and counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.records import picture_path
from qig_serve.samples import ImageSource, Sample, load_image

CAPTION_QUESTION = "Describe the image."
_OPTIONS = {"split": "train", "image": "image", "answer": "caption", "question": ""}
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
        _check_columns(source, row, options)
        where = f"{source}, row {i} in the order of seed {seed}"
        sample = _sample(row, options, where, f"{name}-{i}", _folder(name))
        missing = _missing(sample, text_only)
        if missing:
            empty[missing] = empty.get(missing, 0) + 1
        else:
            samples.append(sample)
        if len(samples) == n:
            break
    left_out = ", ".join(f"{count} without {what}" for what, count in sorted(empty.items()))
    if empty and not samples:
        raise UserError(
            f"{source}: no row can be used ({left_out}): name the columns that hold pictures and "
            "captions, as hf:NAME?image=COLUMN&question=COLUMN&answer=COLUMN"
        )
    if empty:
        notes.append(f"rows of {source} were left out: {left_out}")
    return samples


def _parse(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix("hf:").partition("?")
    options = dict(_OPTIONS)
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
        options[key] = value
    return name, options


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
        yield from stream.shuffle(seed=seed, buffer_size=buffer).take(most)
    except UserError:
        raise
    except Exception as error:  # of the hub's client, of pyarrow, of Pillow, and its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} cannot be read ({reason.rstrip('.')}): {_WAY_OUT}") from None


def _open(datasets: Any, name: str, options: Mapping[str, str]) -> Any:
    split, path = options["split"], Path(name)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    if path.suffix and not path.is_dir() and (path.is_absolute() or path.suffix == ".parquet"):
        if not path.is_file():
            raise UserError(f"hf:{name}: the file {path} does not exist: {_WAY_OUT}")
        if path.suffix != ".parquet":
            raise UserError(
                f"hf:{name}: of single files only parquet is read: give a parquet file, or "
                "CSV and JSON without hf:"
            )
    if any((path / file).is_file() for file in _SAVED):
        saved = datasets.load_from_disk(name)
        if isinstance(saved, dict):
            if split not in saved:
                raise UserError(f"{name} has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset()
    if path.suffix == ".parquet" and path.is_file():
        return datasets.load_dataset("parquet", data_files=name, split=split, streaming=True)
    return datasets.load_dataset(name, options.get("config"), split=split, streaming=True)


def _check_columns(source: str, row: Mapping[str, Any], options: Mapping[str, str]) -> None:
    columns = [options["image"], options["answer"], options["question"]]
    missing = [c for c in columns if c and c not in row]
    if missing:
        raise UserError(
            f"{source}: no column {missing[0]!r}; the columns are {', '.join(row)}. "
            "Map them as hf:NAME?image=COLUMN&question=COLUMN&answer=COLUMN"
        )


def _sample(
    row: Mapping[str, Any], options: Mapping[str, str], where: str, identifier: str, folder: Path
) -> Sample:
    """The sample of a row, with whatever the row has of it."""
    question: str | None = CAPTION_QUESTION
    if options["question"]:
        question = _text(row[options["question"]], f"{where}, column {options['question']}")
    answer = _text(row[options["answer"]], f"{where}, column {options['answer']}")
    column = f"{where}, column {options['image']}"
    content: list[dict[str, Any]] = [
        {"type": "image", "image": _load(image, column)}
        for image in _pictures(row[options["image"]], column, folder)
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
    raise UserError(f"{where}: a text or a list of texts is wanted, not {type(value).__name__}")


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
        path = picture_path(value, folder)
        if path is None or not os.path.isfile(path):
            raise UserError(
                f"{where}: {value[:80]!r} is no picture and no file below {folder.absolute()}: "
                "name a column that holds the pictures, or a local copy of the dataset"
            )
        return [path]
    raise UserError(
        f"{where}: a picture is wanted, its bytes or path, or a list of them, not "
        f"{type(value).__name__}"
    )
