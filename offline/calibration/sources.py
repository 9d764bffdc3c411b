"""Where calibration samples come from: one function per source, all giving `Sample`s.

demo                            the demonstration set's calibration split
samples.jsonl, samples.json     one JSON line per sample, or a list of them, also as LLaVA and
                                ShareGPT4V have them (records.py); images in `image_folder`
folder                          images with captions: NAME.txt beside NAME.png, or one CSV with
                                an image and a caption column
hf:NAME?split=train&image=image&question=prompt&answer=caption
                                a Hugging Face dataset and its columns (hugging_face.py); what
                                CAPTIONS names is the default
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from qig_serve import text_files
from qig_serve.errors import UserError
from qig_serve.offline.calibration.hugging_face import CAPTION_QUESTION, hugging_face
from qig_serve.records import MissingPicture, parse_record, records, resolve_picture, shown
from qig_serve.samples import IMAGE_SUFFIXES, Sample, sample_from_parts

CAPTIONS = "hf:lmms-lab/COCO-Caption2017?split=val&image=image&question=question&answer=answer"
"""Pairs of an image and a caption, the paper's kind of calibration data."""
_IMAGE_COLUMNS = ("image", "file_name", "file", "path", "filename")
_CAPTION_COLUMNS = ("caption", "text", "answer")

T = TypeVar("T")


def load_calibration(
    source: str,
    n: int,
    seed: int = 0,
    image_folder: str | Path | None = None,
    text_only: bool = False,
    notes: list[str] | None = None,
) -> list[Sample]:
    """`n` samples of a source, chosen by `seed`; fewer if it holds fewer.

    `notes` is given what a reader of the report must know about the choice.

    UserError when the source cannot be read (file and line named), when it is empty, and when no
    sample has an image unless `text_only` is set.
    """
    if not source:
        raise UserError(
            "no calibration data: give --calib with a JSONL file, a LLaVA JSON, a folder of "
            "captioned images, hf:DATASET, or 'demo'"
        )
    if source == "demo":
        samples = _demo(n, seed)
    elif source.startswith("hf:"):
        samples = hugging_face(source, n, seed, text_only, [] if notes is None else notes)
    else:
        path = Path(source)
        if path.is_dir():
            samples = _choose(_captioned_folder(path), n, seed)
        elif not path.is_file():
            fault = "is no file" if os.path.lexists(path) else "does not exist"
            raise UserError(f"the calibration data {source} {fault}")
        else:
            samples = _from_file(path, n, seed, image_folder)
    if not samples:
        raise UserError(f"the calibration data {source} holds no samples")
    if not text_only and not any(s.images for s in samples):
        raise UserError(
            f"no calibration sample of {source} has an image, so the vision tokens would go "
            "uncalibrated: add images, or use --text-only"
        )
    return samples


def _choose(items: Sequence[T], n: int, seed: int) -> list[T]:
    """`n` of the items at random, in their own order; all if there are no more."""
    if len(items) <= n:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), n))
    return [items[i] for i in chosen]


def _demo(n: int, seed: int) -> list[Sample]:
    from qig_serve.demo import questions

    return [
        sample_from_parts(f"demo-{s.id}", s.type, s.image, s.question, s.answer)
        for s in questions.samples("calibration", n, seed)
    ]


def _from_file(path: Path, n: int, seed: int, image_folder: str | Path | None) -> list[Sample]:
    """JSON lines, or a JSON list: such files hold hundreds of thousands of records."""
    folder = path.parent if image_folder is None else Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist")
    chosen = _choose(list(records(path)), n, seed)
    try:
        return [parse_record(record, where, folder, number) for where, number, record in chosen]
    except MissingPicture as error:
        raise UserError(f"{error}; see --image-folder") from None


def _captioned_folder(folder: Path) -> list[Sample]:
    """Every captioned image below a folder."""
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise UserError(f"{folder} holds {len(tables)} CSV files; keep the one with the captions")
    if tables:
        return _captions_csv(tables[0])
    samples = []
    for path in sorted(folder.rglob("*")):
        beside = path.with_suffix(".txt")
        if path.suffix.lower() in IMAGE_SUFFIXES and beside.is_file():
            caption = text_files.read_text(beside).strip()
            name = str(path.relative_to(folder))
            samples.append(sample_from_parts(name, "caption", path, CAPTION_QUESTION, caption))
    if not samples:
        raise UserError(
            f"{folder} holds no captioned images: put NAME.txt beside NAME.png, or a CSV with the "
            "columns image and caption"
        )
    return samples


def _captions_csv(path: Path) -> list[Sample]:
    samples = []
    columns = text_files.csv_columns(path)
    image = next((c for c in _IMAGE_COLUMNS if c in columns), None)
    caption = next((c for c in _CAPTION_COLUMNS if c in columns), None)
    if image is None or caption is None:
        raise UserError(f"{path} needs the columns image and caption, and has {columns}")
    for row in text_files.csv_rows(path):
        if row.surplus:
            raise UserError(
                f"{path}, line {row.line}: more fields than columns: quote a caption with commas"
            )
        name, text = row.fields[image], row.fields[caption].strip()
        picture = resolve_picture(name, f"{path}, line {row.line}", path.parent)
        samples.append(sample_from_parts(shown(name), "caption", picture, CAPTION_QUESTION, text))
    return samples
