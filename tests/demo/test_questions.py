"""The questions: exact answers, disjoint splits, one line per sample."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qig_serve.cli import main
from qig_serve.demo.pictures import (
    CELL,
    DIGIT_SHARES,
    GRID,
    IMAGE_SIZE,
    LABEL_CLASSES,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    Word,
    cell_labels,
    digit_sources,
    make_scene,
    render,
)
from qig_serve.demo.questions import (
    ASK,
    SEED_STRIDE,
    SPLIT_SEEDS,
    SPLITS,
    TYPES,
    Question,
    make_lesson,
    make_sample,
    picture_seed,
    samples,
    write_jsonl,
)

USED = {"train": 600, "calibration": 512, "dev": 400, "test": 2000}


def test_samples_are_reproducible_and_types_take_turns() -> None:
    first, second = list(samples("dev", 24)), list(samples("dev", 24))
    for a, b in zip(first, second, strict=True):
        assert (a.id, a.type, a.question, a.answer) == (b.id, b.type, b.question, b.answer)
        assert a.image.tobytes() == b.image.tobytes()
        assert a.image.size == (IMAGE_SIZE, IMAGE_SIZE) and a.image.mode == "RGB"
    assert [s.type for s in first] == list(TYPES) * 3
    other = next(iter(samples("dev", 1, seed=1)))
    assert other.image.tobytes() != first[0].image.tobytes()


def test_splits_share_no_seed() -> None:
    ranges = []
    for split in SPLITS:
        low = picture_seed(split, 0)
        high = picture_seed(split, SEED_STRIDE - 1, SPLIT_SEEDS // SEED_STRIDE - 1)
        ranges.append((low, high))
    for (_, high), (low, _) in itertools.pairwise(ranges):
        assert high < low
    with pytest.raises(ValueError, match="outside"):
        picture_seed("dev", SEED_STRIDE)
    with pytest.raises(ValueError, match="known: train"):
        picture_seed("validation", 0)


def test_splits_share_no_picture() -> None:
    owner: dict[str, str] = {}
    for split, n in USED.items():
        for sample in samples(split, n):
            key = hashlib.sha256(sample.image.tobytes()).hexdigest()
            assert owner.setdefault(key, split) == split
    for index in range(600):
        key = hashlib.sha256(make_lesson(index).pixels.tobytes()).hexdigest()
        assert owner.setdefault(key, "train") == "train"


def test_splits_share_no_generator() -> None:
    # 257 and 2**40 + 257 seed the same generator: numbers that differ are not enough.
    assert random.Random(257).random() == random.Random((1 << 40) + 257).random()
    states = set()
    for split in SPLITS:
        for seed in (0, 1, 255):
            for index in (*range(1100), SEED_STRIDE - 1):
                states.add(random.Random(picture_seed(split, index, seed)).random())
    assert len(states) == len(SPLITS) * 3 * 1101


def test_splits_share_no_handwriting() -> None:
    pools = [set(digit_sources(split)) for split in SPLITS]
    assert [len(p) for p in pools] == [DIGIT_SHARES[split] for split in SPLITS]
    assert len(set.union(*pools)) == sum(map(len, pools))


def _scene() -> Scene:
    things = (
        Thing(0, 1, "large", "red", "star"),
        Thing(2, 4, "small", "blue", "ring"),
        Thing(3, 0, "small", "red", "ring"),
    )
    return Scene(things, None, Word(5, 2, "cat"))


def _asked(kind: str) -> dict[str, str]:
    rng = random.Random(0)
    return dict(ASK[kind](_scene(), rng) for _ in range(400))


def test_answers_are_right() -> None:
    assert _asked("color")["What color is the star?"] == "red"
    assert _asked("color")["What color is the object at row 3 column 5?"] == "blue"
    assert _asked("shape")["What shape is the blue object?"] == "ring"
    count = _asked("count")
    assert count["How many rings are there?"] == "2"
    assert count["How many red rings are there?"] == "1"
    assert count["How many objects are there?"] == "3"
    exist = _asked("exist")
    assert exist["Is there a red star?"] == "yes"
    assert exist["Is there a blue star?"] == "no"
    relation = _asked("relation")
    assert relation["Is the red star left of the blue ring?"] == "yes"
    assert relation["Is the red star below the red ring?"] == "no"
    assert set(_asked("word").values()) == {"cat"}
    assert set(_asked("caption").values()) == {
        "a large red star at row 1 column 2, a small blue ring at row 3 column 5, "
        "a small red ring at row 4 column 1"
    }


def test_yes_and_no_are_balanced() -> None:
    for kind in ("exist", "relation"):
        answers = [s.answer for s in samples("train", 1600) if s.type == kind]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_ambiguous_names_are_not_used() -> None:
    for question in _asked("color"):
        assert "ring" not in question  # two rings: neither may be asked for by shape
    for question in _asked("shape"):
        assert "red object" not in question or "large" in question or "small" in question


def test_cells_hold_what_the_labels_say() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        scene = make_scene(rng, "train", with_digit=True, with_word=True)
        labels = cell_labels(scene)
        assert labels.shape == (GRID * GRID, len(LABEL_CLASSES))
        assert (labels < np.array(LABEL_CLASSES)).all()
        pixels = render(scene, rng).astype(int)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        cells = pixels.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4)
        spread = np.ptp(cells.reshape(GRID * GRID, -1, 3), axis=1).max(-1)
        assert ((spread > 40) == labels[:, :5].any(-1)).all()  # nothing straddles two cells
        assert sum(labels[:, 2] > 0) == len(scene.things)
        cells_taken = len(scene.things) + 1 + len(scene.word.text if scene.word else "")
        assert labels[:, :5].any(-1).sum() == cells_taken


def test_vocabulary_is_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 60
    assert {len(word) for word in WORDS} == {3, 4, 5}
    assert len(set(SHAPES)) == 8


def test_lessons_hold_a_caption_and_a_dozen_questions() -> None:
    for index in range(20):
        lesson = make_lesson(index)
        kinds = [kind for kind, _, _ in lesson.questions]
        assert kinds.count("caption") == 1 and 11 <= len(kinds) <= 13
        assert ("digit" in kinds) == (lesson.scene.digit is not None)
        assert ("word" in kinds) == (lesson.scene.word is not None)
    assert make_lesson(0, plain=True).questions == ()


def test_write_jsonl(tmp_path: Path) -> None:
    path = write_jsonl("calibration", 9, tmp_path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line, sample in zip(lines, samples("calibration", 9), strict=True):
        image, text = line["messages"][0]["content"]
        assert line["messages"][0]["role"] == "user"
        assert text == {"type": "text", "text": sample.question}
        assert (line["id"], line["type"], line["answer"]) == (
            sample.id,
            sample.type,
            sample.answer,
        )
        with Image.open(tmp_path / image["image_url"]["url"]) as picture:
            assert picture.tobytes() == sample.image.tobytes()


def test_questions_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another split, too: pictures of both would have the same names."""
    command = ["demo", "questions", "--n", "2", "--output", str(tmp_path / "q")]
    assert main([*command, "--split", "dev"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for split, name in (("dev", "dev.jsonl"), ("test", "images")):
        assert main([*command, "--split", split]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'q' / name} exists already; name a new directory" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("n", [0, -1, SEED_STRIDE + 1])
def test_a_number_of_questions_that_there_is_not(
    n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "questions", f"--n={n}", "--output", str(tmp_path / "q")]) == 2
    assert f"no {n} questions of seed 0" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main(["demo", f"--questions={n}", "--workdir", str(tmp_path / "q")]) == 2
    assert main(["demo", f"--samples={n}", "--workdir", str(tmp_path / "q")]) == 2
    assert not (tmp_path / "q").exists()


def test_nothing_is_left_of_questions_that_were_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(split: str, n: int, seed: int) -> Iterator[Question]:
        yield make_sample(split, 0, seed)
        raise KeyboardInterrupt

    monkeypatch.setattr("qig_serve.demo.questions.samples", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_jsonl("dev", 2, tmp_path)
    assert not list(tmp_path.iterdir())
