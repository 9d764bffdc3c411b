"""What can happen to a directory's safetensors files and their index."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qig_serve.model_directory import INDEX_FILE


def change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the table of which file holds which tensor."""
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Writes another header before the same data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def huge_header(path: Path) -> None:
    """Makes it a sparse file whose header is 2 GB, as its length says."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate((2 << 30) + 100)


def flip_bit(path: Path, name: bytes, bit: int) -> None:
    """Flips a bit of the header: the first tensor whose name has `name` gets another one."""
    data = bytearray(path.read_bytes())
    data[data.index(name)] ^= bit
    path.write_bytes(data)
