"""The ground plan of offline/: no import runs up a floor, none goes round in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qig_serve

OFFLINE = Path(qig_serve.__file__).parent / "offline"
FLOORS = (
    ("disk", "results"),
    ("source", "processes", "progress"),
    ("calibration", "placement"),
    ("recipe", "report"),
    ("passes",),
    ("importance", "rounding", "checkpoint"),
    ("equalization", "explain", "publish", "tuning"),
    ("estimate",),
    ("pipeline",),
)
"""From the ground up; the package's own modules lie beneath. Rooms of one floor share no door."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PREFIX = "qig_serve.offline."


def modules() -> dict[str, Path]:
    """Dotted name below offline -> file."""
    found = {}
    for path in sorted(OFFLINE.rglob("*.py")):
        found[".".join(path.relative_to(OFFLINE).with_suffix("").parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of offline that a file imports anywhere, by their names below it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are absolute"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    below = {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    return below & modules().keys()


def test_every_room_stands_on_a_floor() -> None:
    assert {name.partition(".")[0] for name in modules()} == FLOOR_OF.keys()


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name: str) -> None:
    room = name.partition(".")[0]
    for other in imports(modules()[name]):
        below = other.partition(".")[0]
        assert below == room or FLOOR_OF[below] < FLOOR_OF[room], f"{name} imports {other}"


def test_no_circle() -> None:
    TopologicalSorter({name: imports(path) for name, path in modules().items()}).prepare()
