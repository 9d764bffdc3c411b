"""Procedural questions about pictures, with exact answers, in four disjoint splits.

A sample is made from (split, index) alone. Each split owns a range of seeds, and each range a
share of the handwritten digits, so no picture of one split can turn up in another.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qig_serve.demo.pictures import COLORS, SHAPES, SIZES, Pixels, Scene, Thing, make_scene, render
from qig_serve.errors import UserError

TYPES = ("color", "shape", "count", "exist", "relation", "digit", "word", "caption")
SPLITS = ("train", "calibration", "dev", "test")
SPLIT_SEEDS = 1 << 32  # seeds a split owns
# Splits lie this far apart, not side by side: random.Random adds a seed's 32-bit words and their
# places, so that the words [n] and [n, n - 1] are one and the same generator. [n] and
# [n, 0, split] never are.
SPLIT_SPACING = 1 << 64
SEED_STRIDE = 1 << 24  # seeds between two values of `seed` inside a split


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its exact answer."""

    id: str
    type: str
    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Lesson:
    """One picture with many questions about it, as training uses them."""

    scene: Scene
    pixels: Pixels  # [144, 144, 3]
    questions: tuple[tuple[str, str, str], ...]  # (type, question, answer)


def picture_seed(split: str, index: int, seed: int = 0) -> int:
    """The seed of a picture; ranges of different splits never meet."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 <= index < SEED_STRIDE or not 0 <= seed < SPLIT_SEEDS // SEED_STRIDE:
        raise ValueError(f"index {index} or seed {seed} is outside what a split owns")
    return SPLITS.index(split) * SPLIT_SPACING + seed * SEED_STRIDE + index


def place(thing: Thing) -> str:
    """Where a thing stands, rows and columns counted from 1."""
    return f"row {thing.row + 1} column {thing.column + 1}"


def _pick(rng: random.Random, *forms: str) -> str:
    return rng.choice(forms)


def _only(scene: Scene, thing: Thing, *attributes: str) -> bool:
    """Whether these attributes single the thing out."""
    key = [getattr(thing, name) for name in attributes]
    return sum([getattr(t, name) for name in attributes] == key for t in scene.things) == 1


def _color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    forms = "What color is the {}?", "What is the color of the {}?", "Which color does the {} have?"
    return _of_one(scene, rng, "color", "shape", "{}", forms)


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    forms = "What shape is the {}?", "What is the shape of the {}?", "Which shape does the {} have?"
    return _of_one(scene, rng, "shape", "color", "{} object", forms)


def _of_one(
    scene: Scene, rng: random.Random, asked: str, known: str, named: str, forms: tuple[str, ...]
) -> tuple[str, str]:
    """Asks for an attribute of a thing that its place says, or another attribute if that can."""
    thing = rng.choice(scene.things)
    names, name = [f"object at {place(thing)}"], named.format(getattr(thing, known))
    if _only(scene, thing, known):
        names += [name] * 2
    if _only(scene, thing, "size", known):
        names.append(f"{thing.size} {name}")
    return rng.choice(forms).format(rng.choice(names)), getattr(thing, asked)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    like = rng.choice(scene.things)
    color, shape, size = like.color, like.shape, like.size
    if rng.random() < 0.25:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    kind = rng.randrange(5)
    if kind == 0:
        name, number = f"{color} objects", sum(t.color == color for t in scene.things)
    elif kind == 1:
        name, number = plural, sum(t.shape == shape for t in scene.things)
    elif kind == 2:
        name, number = f"{size} objects", sum(t.size == size for t in scene.things)
    elif kind == 3:
        name = f"{color} {plural}"
        number = sum((t.color, t.shape) == (color, shape) for t in scene.things)
    else:
        name, number = "objects", len(scene.things)
    form = _pick(rng, "How many {} are there?", "How many {} do you see?", "Count the {}.")
    return form.format(name), str(number)


def _exist(scene: Scene, rng: random.Random) -> tuple[str, str]:
    like = rng.choice(scene.things)
    size, color, shape = like.size, like.color, like.shape
    answer = rng.random() < 0.5
    sized = rng.random() < 0.5

    def there() -> bool:
        return any(
            (t.color, t.shape) == (color, shape) and (not sized or t.size == size)
            for t in scene.things
        )

    while there() != answer:
        # A "no" differs from something in the picture by an attribute, half of the time
        # one that something else in the picture has.
        other = rng.choice(scene.things)
        near = rng.random() < 0.5
        what = rng.randrange(3 if sized else 2)
        if what == 0:
            color = other.color if near else rng.choice(list(COLORS))
        elif what == 1:
            shape = other.shape if near else rng.choice(SHAPES)
        else:
            size = rng.choice(list(SIZES))
    name = f"{size} {color} {shape}" if sized else f"{color} {shape}"
    article = "an" if name[0] in "aeiou" else "a"
    form = _pick(rng, "Is there {} {}?", "Do you see {} {}?", "Does the picture show {} {}?")
    return form.format(article, name), "yes" if answer else "no"


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    named = []
    for thing in scene.things:
        if _only(scene, thing, "color", "shape"):
            named.append((thing, f"{thing.color} {thing.shape}"))
        elif _only(scene, thing, "size", "color", "shape"):
            named.append((thing, f"{thing.size} {thing.color} {thing.shape}"))
    if len(named) < 2:  # twins all over: fall back to places
        named = [(thing, f"object at {place(thing)}") for thing in scene.things]
    (a, a_name), (b, b_name) = rng.sample(named, 2)
    down, right = a.row - b.row, a.column - b.column
    words = []
    if right:
        words.append((("left of", "to the left of"), ("right of", "to the right of"), right < 0))
    if down:
        words.append((("above", "higher than"), ("below", "lower than"), down < 0))
    first, second, is_first = rng.choice(words)
    ask_first = rng.random() < 0.5
    relation = rng.choice(first if ask_first else second)
    return f"Is the {a_name} {relation} the {b_name}?", "yes" if ask_first == is_first else "no"


def _digit(scene: Scene, rng: random.Random) -> tuple[str, str]:
    assert scene.digit is not None
    form = _pick(
        rng, "What digit is written?", "Which digit do you see?", "Read the handwritten digit."
    )
    return form, str(scene.digit.value)


def _word(scene: Scene, rng: random.Random) -> tuple[str, str]:
    assert scene.word is not None
    return _pick(
        rng, "What word is written?", "Which word do you see?", "Read the word."
    ), scene.word.text


def _caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    form = _pick(
        rng, "Describe the picture.", "Describe every object.", "List all objects and their places."
    )
    return form, ", ".join(f"a {t.size} {t.color} {t.shape} at {place(t)}" for t in scene.things)


ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str]]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exist": _exist,
    "relation": _relation,
    "digit": _digit,
    "word": _word,
    "caption": _caption,
}


def make_sample(split: str, index: int, seed: int = 0) -> Question:
    """The sample of a split with this index; its type is index modulo the number of types."""
    rng = random.Random(picture_seed(split, index, seed))
    kind = TYPES[index % len(TYPES)]
    with_digit = True if kind == "digit" else None
    with_word = True if kind == "word" else None
    scene = make_scene(rng, split, with_digit, with_word)
    pixels = render(scene, rng)
    question, answer = ASK[kind](scene, rng)
    return Question(str(index), kind, Image.fromarray(pixels), question, answer)


def make_lesson(index: int, seed: int = 0, plain: bool = False) -> Lesson:
    """A training picture with a dozen questions, one caption among them; none if `plain`."""
    rng = random.Random(picture_seed("train", index, seed))
    scene = make_scene(rng, "train")
    pixels = render(scene, rng)
    if plain:
        return Lesson(scene, pixels, ())
    kinds = ["color", "shape", "count", "exist", "relation"] * 2 + ["caption"]
    kinds += ["digit"] * (scene.digit is not None) + ["word"] * (scene.word is not None)
    rng.shuffle(kinds)
    return Lesson(scene, pixels, tuple((kind, *ASK[kind](scene, rng)) for kind in kinds))


def samples(split: str, n: int, seed: int = 0) -> Iterator[Question]:
    """The first n samples of a split, all types in turn; `seed` gives another draw of it.

    UserError, before the first of them, for a split, a number or a seed that there is not.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    seeds = SPLIT_SEEDS // SEED_STRIDE
    if not 1 <= n <= SEED_STRIDE or not 0 <= seed < seeds:
        raise UserError(
            f"the demonstration set has no {n} questions of seed {seed}: 1 to {SEED_STRIDE} of "
            f"each seed from 0 to {seeds - 1}"
        )
    return (make_sample(split, index, seed) for index in range(n))


def write_jsonl(split: str, n: int, directory: Path | str, seed: int = 0) -> Path:
    """Writes images/*.png and {split}.jsonl in OpenAI chat form; returns the JSONL's path.

    UserError as of `samples`, and where either of the two exists (splits share the names of
    pictures). Nothing is left of a set that was not finished.
    """
    drawn = samples(split, n, seed)
    images, path = Path(directory, "images"), Path(directory, f"{split}.jsonl")
    for there in (path, images):
        if os.path.lexists(there):
            raise UserError(f"{there} exists already; name a new directory")
    images.mkdir(parents=True)
    try:
        lines = [_line(sample, images) for sample in drawn]
        path.write_text("".join(lines), encoding="utf-8")
    except BaseException:
        shutil.rmtree(images)
        path.unlink(missing_ok=True)
        raise
    return path


def _line(sample: Question, images: Path) -> str:
    """The sample's line; its picture is written into the folder `images` beside the lines."""
    picture = images / f"{sample.id}.png"
    sample.image.save(picture)
    content = [
        {"type": "image_url", "image_url": {"url": f"{images.name}/{picture.name}"}},
        {"type": "text", "text": sample.question},
    ]
    line = {
        "id": sample.id,
        "type": sample.type,
        "messages": [{"role": "user", "content": content}],
        "answer": sample.answer,
    }
    return json.dumps(line) + "\n"
