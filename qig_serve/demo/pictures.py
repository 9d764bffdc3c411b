"""Pictures of the demonstration questions: a scene is drawn from a seed, then rendered.

A picture is 144 x 144 pixels, a 6 x 6 grid of 24-pixel cells. With a patch size of 24 one image
token is one cell, so what stands in a cell never straddles two tokens. Three to six coloured
shapes, and in some pictures a handwritten digit or a word with one letter per cell.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from qig_serve.extras import require

GRID = 6
CELL = 24  # pixels
IMAGE_SIZE = GRID * CELL  # pixels

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (45, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (135, 50, 175),
    "orange": (245, 130, 30),
    "cyan": (40, 190, 210),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES: dict[str, float] = {"large": 9.5, "small": 5.5}  # radius in pixels
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = """
ant arm bag bed bee box bus cat cow cup dog ear egg fox hat ice jar key leg map bird boat
book cake door duck fish frog gate hand king lamp leaf milk moon nest rain ship tree wolf
apple beach bread chair cloud dress grape horse house juice knife lemon mouse ocean piano
queen river sheep table tiger train water whale zebra
"""
WORDS = tuple(_WORDS.split())

# Handwritten digits are shared out so that no split ever shows another split's handwriting.
DIGIT_SHARES = {"train": 1200, "calibration": 130, "dev": 130, "test": 337}

Pixels = npt.NDArray[np.uint8]
Alpha = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """One coloured shape; row and column count from 0."""

    row: int
    column: int
    size: str
    color: str
    shape: str


@dataclass(frozen=True)
class Digit:
    """A handwritten digit in a cell; `source` is its index in scikit-learn's data set."""

    row: int
    column: int
    value: int
    source: int


@dataclass(frozen=True)
class Word:
    """A word, one letter per cell from (row, column) to the right."""

    row: int
    column: int
    text: str


@dataclass(frozen=True)
class Scene:
    """Everything in a picture; things stand in reading order."""

    things: tuple[Thing, ...]
    digit: Digit | None
    word: Word | None


@functools.cache
def handwriting() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Digits [D, 8, 8] of 0 to 16, and which each is [D]."""
    require("sklearn", "the demonstration's pictures of handwritten digits")
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    return data.images, data.target


@functools.cache
def digit_sources(split: str) -> tuple[int, ...]:
    """Indices into scikit-learn's digits which a split may show; disjoint between splits."""
    _, target = handwriting()
    order = list(range(len(target)))
    random.Random(8).shuffle(order)
    start = 0
    for name, share in DIGIT_SHARES.items():
        if name == split:
            return tuple(order[start : start + share])
        start += share
    raise ValueError(f"unknown split {split!r}; known: {', '.join(DIGIT_SHARES)}")


def make_scene(
    rng: random.Random, split: str, with_digit: bool | None = None, with_word: bool | None = None
) -> Scene:
    """Draws a scene; a digit and a word are there by chance unless asked for."""
    free = [(row, column) for row in range(GRID) for column in range(GRID)]
    word = None
    if rng.random() < 0.55 if with_word is None else with_word:
        text = rng.choice(WORDS)
        row, column = rng.randrange(GRID), rng.randrange(GRID - len(text) + 1)
        word = Word(row, column, text)
        taken = {(row, column + i) for i in range(len(text))}
        free = [cell for cell in free if cell not in taken]
    rng.shuffle(free)
    digit = None
    if rng.random() < 0.55 if with_digit is None else with_digit:
        source = rng.choice(digit_sources(split))
        row, column = free.pop()
        digit = Digit(row, column, int(handwriting()[1][source]), source)
    things: list[Thing] = []
    for _ in range(rng.randint(3, 6)):
        row, column = free.pop()
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        # Repeats make counting and naming places worth asking about.
        if things and rng.random() < 0.3:
            color = rng.choice(things).color
        if things and rng.random() < 0.3:
            shape = rng.choice(things).shape
        things.append(Thing(row, column, rng.choice(list(SIZES)), color, shape))
    things.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(tuple(things), digit, word)


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    def ring(count: int, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
        points = []
        for i in range(count):
            angle = 2 * math.pi * i / count + turn
            r = radii[i % len(radii)] * radius
            points.append((r * math.cos(angle), r * math.sin(angle)))
        return points

    if shape == "square":
        return ring(4, (1.2,), math.pi / 4)
    if shape == "diamond":
        return [(0, -radius * 1.1), (radius * 0.7, 0), (0, radius * 1.1), (-radius * 0.7, 0)]
    if shape == "triangle":
        return [(0, -radius), (radius, radius * 0.85), (-radius, radius * 0.85)]
    if shape == "star":
        return ring(10, (1.1, 0.45), -math.pi / 2)
    if shape == "cross":
        a, b = radius, radius * 0.34
        return [
            *((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)),
            *((b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)),
        ]
    if shape == "heart":
        points = []
        for i in range(40):
            t = 2 * math.pi * i / 40
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((radius * math.sin(t) ** 3, -radius * (y + 2) / 16))
        return points
    return ring(48, (1.0,), 0.0)


@functools.cache
def _shape_alpha(shape: str, size: str) -> Alpha:
    """Coverage of a cell by a shape in its middle, [CELL, CELL] in 0..1."""
    scale = 8
    image = Image.new("L", (CELL * scale, CELL * scale))
    draw = ImageDraw.Draw(image)
    middle = CELL * scale / 2

    def polygon(radius: float, fill: int) -> None:
        points = _outline(shape, radius)
        draw.polygon([(middle + x * scale, middle + y * scale) for x, y in points], fill=fill)

    polygon(SIZES[size], 255)
    if shape == "ring":
        polygon(SIZES[size] * 0.55, 0)
    return np.asarray(image.reduce(scale), dtype=np.float32) / np.float32(255)


@functools.cache
def _letter_alpha(letter: str) -> Alpha:
    """Coverage of a cell by a printed letter, [CELL, CELL] in 0..1."""
    font = ImageFont.load_default(size=21)
    image = Image.new("L", (CELL, CELL))
    ImageDraw.Draw(image).text((CELL / 2, 18), letter, fill=255, font=font, anchor="ms")
    return np.asarray(image, dtype=np.float32) / np.float32(255)


@functools.lru_cache(maxsize=16384)
def _digit_alpha(source: int, side: int, angle: int) -> Alpha:
    """Coverage of a cell by a handwritten digit, [CELL, CELL] in 0..1."""
    ink = (handwriting()[0][source] * (255 / 16)).astype(np.uint8)  # [8, 8]
    image = Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(angle, Image.Resampling.BILINEAR)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(image, ((CELL - side) // 2, (CELL - side) // 2))
    return np.asarray(cell, dtype=np.float32) / np.float32(255)


def _paint(
    canvas: npt.NDArray[np.float32],
    row: int,
    column: int,
    alpha: Alpha,
    color: tuple[int, ...],
    shift: tuple[int, int] = (0, 0),
) -> None:
    cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    if shift != (0, 0):
        alpha = np.roll(alpha, shift, axis=(0, 1))  # margins are wide enough for the shift
    cell += alpha[:, :, None] * (np.asarray(color, dtype=np.float32) - cell)


def render(scene: Scene, rng: random.Random) -> Pixels:
    """Renders a scene to [144, 144, 3] uint8 RGB."""
    noise = np.random.default_rng(rng.getrandbits(32))
    paper = [rng.randint(225, 250) for _ in range(3)]
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = np.asarray(paper, dtype=np.float32)
    for thing in scene.things:
        color = tuple(c + rng.randint(-12, 12) for c in COLORS[thing.color])
        reach = 1 if thing.size == "large" else 2
        shift = (rng.randint(-reach, reach), rng.randint(-reach, reach))
        alpha = _shape_alpha(thing.shape, thing.size)
        _paint(canvas, thing.row, thing.column, alpha, color, shift)
    if scene.digit is not None:
        alpha = _digit_alpha(scene.digit.source, rng.randint(18, 21), rng.choice((-8, 0, 8)))
        _paint(canvas, scene.digit.row, scene.digit.column, alpha, (30, 30, 110))
    if scene.word is not None:
        for i, letter in enumerate(scene.word.text):
            shift = (rng.randint(-1, 1), rng.randint(-1, 1))
            alpha = _letter_alpha(letter)
            _paint(canvas, scene.word.row, scene.word.column + i, alpha, (60, 50, 50), shift)
    canvas += noise.integers(-7, 8, size=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int8)
    return np.clip(canvas, 0, 255).astype(np.uint8)


# Classes a label column can take: size, colour, shape, digit and letter, with 0 for nothing;
# then the cell's own row and column, so that an image token says where it is.
LABEL_CLASSES = (len(SIZES) + 1, len(COLORS) + 1, len(SHAPES) + 1, 11, len(LETTERS) + 1, GRID, GRID)


def cell_labels(scene: Scene) -> npt.NDArray[np.int64]:
    """What stands in each cell and where it is, [36, 7], columns as in LABEL_CLASSES."""
    labels = np.zeros((GRID * GRID, len(LABEL_CLASSES)), dtype=np.int64)
    labels[:, 5], labels[:, 6] = np.divmod(np.arange(GRID * GRID), GRID)
    sizes, colors = list(SIZES), list(COLORS)
    for thing in scene.things:
        labels[thing.row * GRID + thing.column, :3] = (
            sizes.index(thing.size) + 1,
            colors.index(thing.color) + 1,
            SHAPES.index(thing.shape) + 1,
        )
    if scene.digit is not None:
        labels[scene.digit.row * GRID + scene.digit.column, 3] = scene.digit.value + 1
    if scene.word is not None:
        for i, letter in enumerate(scene.word.text):
            cell = scene.word.row * GRID + scene.word.column + i
            labels[cell, 4] = LETTERS.index(letter) + 1
    return labels
