"""Where calibration samples come from: one function per source, all giving `Sample`s.

demo                            the demonstration set's calibration split
samples.jsonl, samples.json     one JSON line per sample, or a list of them, also as LLaVA and
                                ShareGPT4V have them (records.py); images in `image_folder`
folder                          images with captions: NAME.txt beside NAME.png, or one CSV
captions.csv                    columns image and caption, and perhaps question
hf:NAME?split=train&image=image&question=prompt&answer=caption
                                a Hugging Face dataset and its columns (hugging_face.py); what
                                CAPTIONS names is the default; without a caption the turns of
                                messages, conversations or a form of turns.py, or else
                                question and answer
file.parquet                    the same
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from qig_serve import text_files
from qig_serve.errors import UserError
from qig_serve.offline.calibration.hugging_face import CAPTION_QUESTION, hugging_face
from qig_serve.records import MissingPicture, parse_record, records, resolve_picture, shown
from qig_serve.samples import IMAGE_SUFFIXES, Sample, sample_from_parts
from qig_serve.turns import is_rejected

CAPTIONS = "hf:lmms-lab/COCO-Caption2017?split=val&image=image&question=question&answer=answer"
"""Pairs of an image and a caption, the paper's kind of calibration data."""
_GIVE = (
    "give --calib with a JSON or JSONL file, a CSV or parquet file, a folder of captioned images, "
    "hf:DATASET, or 'demo'"
)
_IMAGE_COLUMNS = ("image", "file_name", "file", "path", "filename")
_CAPTION_COLUMNS = ("caption", "text", "answer")
_QUESTION_COLUMNS = ("question", "prompt")

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
        raise UserError(f"no calibration data: {_GIVE}")
    notes = [] if notes is None else notes
    parquet = source.endswith(".parquet") and not source.startswith("hf:")
    if image_folder is not None and (source == "demo" or parquet or source[:3] == "hf:"):
        raise UserError(f"--image-folder is for files that name pictures, not for {source}")
    if source == "demo":
        samples = _demo(n, seed)
    elif source == CAPTIONS:
        try:
            samples = hugging_face(source, n, seed, text_only, notes)
        except UserError as error:
            raise UserError(f"{_GIVE}. Without it the hub's captions are read: {error}") from None
    elif parquet or source.startswith("hf:"):
        samples = hugging_face(f"hf:{source.removeprefix('hf:')}", n, seed, text_only, notes)
    else:
        folder = None if image_folder is None else Path(image_folder)
        samples = _from_path(Path(source), n, seed, folder, notes)
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


def _from_path(
    path: Path, n: int, seed: int, image_folder: Path | None, notes: list[str]
) -> list[Sample]:
    """A folder or a CSV file of captions, JSON lines, or a JSON list."""
    if not path.is_dir() and not path.is_file():
        fault = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"the calibration data {path} {fault}")
    folder = image_folder or (path if path.is_dir() else path.parent)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist")
    if path.is_dir():
        found = _captioned_folder(path, image_folder)
        return _choose(_captioned(found, str(path), notes), n, seed)
    if path.suffix.lower() == ".csv":
        return _choose(_captioned(_captions_csv(path, folder), str(path), notes), n, seed)
    # Chosen before they are parsed: such files hold hundreds of thousands.
    chosen = _choose(_wanted(list(records(path)), path, notes), n, seed)
    try:
        return [parse_record(record, where, folder, number) for where, number, record in chosen]
    except MissingPicture as error:
        raise UserError(f"{error}; see --image-folder") from None


def _wanted(
    found: list[tuple[str, int, Any]], path: Path, notes: list[str]
) -> list[tuple[str, int, Any]]:
    """The records without those whose answer is marked as not wanted; `notes` gets how many."""
    wanted = [record for record in found if not is_rejected(record[2])]
    if left_out := len(found) - len(wanted):
        notes.append(
            f"records of {path} were left out: {left_out} whose answer is not wanted (label or "
            "kto_tag is false)"
        )
    if found and not wanted:
        raise UserError(
            f"{path}: the answers of all its {len(found)} records are marked as not wanted (label "
            "or kto_tag is false): give samples with answers that are"
        )
    return wanted


def _captioned_folder(folder: Path, image_folder: Path | None) -> list[Sample]:
    """Every captioned image below a folder, hidden ones apart; those with an empty caption too."""
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and p.name[0] != ".")
    if len(tables) > 1:
        raise UserError(f"{folder} holds {len(tables)} CSV files; keep the one with the captions")
    if tables:
        return _captions_csv(tables[0], image_folder or folder)
    if image_folder is not None:
        raise UserError(f"--image-folder is for files that name pictures, not for {folder}")
    samples = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        texts = [path.with_suffix(suffix) for suffix in (".txt", ".TXT")]
        beside = next((p for p in texts if p.is_file()), None)
        if path.suffix.lower() not in IMAGE_SUFFIXES or beside is None:
            continue
        if not any(part.startswith(".") for part in name.parts):  # macOS leaves ._NAME beside NAME
            caption = text_files.read_text(beside).strip()
            samples.append(sample_from_parts(str(name), "caption", path, CAPTION_QUESTION, caption))
    if not samples:
        meant = next(iter(sorted(folder.glob("*.json*"))), None)
        raise UserError(
            f"{folder} holds no captioned images: "
            + (f"name the file itself, {meant}; or " if meant else "")
            + "put NAME.txt beside NAME.png, or a CSV with the columns image and caption"
        )
    return samples


def _captions_csv(path: Path, folder: Path) -> list[Sample]:
    """The rows of a CSV file, also those with an empty caption."""
    samples = []
    columns = text_files.csv_columns(path)
    image = next((c for c in _IMAGE_COLUMNS if c in columns), None)
    caption = next((c for c in _CAPTION_COLUMNS if c in columns), None)
    asked = next((c for c in _QUESTION_COLUMNS if c in columns), None)
    if image is None or caption is None:
        raise UserError(f"{path} needs the columns image and caption, and has {columns}")
    for row in text_files.csv_rows(path):
        where = f"{path}, line {row.line}"
        if row.surplus:
            raise UserError(f"{where}: more fields than columns: quote a caption with commas")
        name, text = row.fields[image], row.fields[caption].strip()
        picture = resolve_picture(name, where, folder)
        question = row.fields[asked].strip() if asked else CAPTION_QUESTION
        if not question:
            raise UserError(f"{where}: the column {asked} is empty")
        samples.append(sample_from_parts(shown(name), "caption", picture, question, text))
    return samples


def _captioned(samples: list[Sample], source: str, notes: list[str]) -> list[Sample]:
    """Those that have a caption; `notes` gets how many have none."""
    found = [s for s in samples if s.answer]
    if samples and not found:
        raise UserError(f"{source}: all of its {len(samples)} pictures are without a caption")
    if empty := len(samples) - len(found):
        notes.append(f"pictures of {source} were left out: {empty} without a caption")
    return found
