"""Reads a source model's safetensors, a tensor at a time, and refuses what is broken, by name.

Opening reads headers only. Names are the files' own: transformers renames modules from version to
version, published checkpoints keep their tensors' names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qig_serve.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SourceCheckpoint:
    """The weights of a Hugging Face directory: names, shapes, and lazily the tensors."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._shard_names():
            self._add_shard(name)
        missing = [n for n in self._wanted if n not in self._file_of]
        if missing:
            raise UserError(
                f"{self.directory / INDEX_FILE} names the tensor {missing[0]}, which is not in "
                f"{self._wanted[missing[0]]}: the checkpoint is incomplete; download it again"
            )

    def _shard_names(self) -> list[str]:
        self._wanted: dict[str, str] = {}
        index = self.directory / INDEX_FILE
        if not index.is_file():
            if (self.directory / SINGLE_FILE).is_file():
                return [SINGLE_FILE]
            found = sorted(p.name for p in self.directory.glob("*.safetensors"))
            if found:
                return found
            pickles = [p.name for p in self.directory.iterdir() if p.suffix in PICKLE_SUFFIXES]
            if pickles:
                raise UserError(
                    f"{self.directory} has its weights in pickle form ({pickles[0]}), which can "
                    "run code when it is read: convert it to safetensors"
                )
            raise UserError(f"{self.directory} has no safetensors weights")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._wanted = {str(k): str(v) for k, v in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is not an index of safetensors: download it again") from None
        names = sorted(set(self._wanted.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}, which is not a file beside it")
            if not (self.directory / name).is_file():
                raise UserError(
                    f"{index} names the shard {name}, which is missing: download it again"
                )
        return names

    def _add_shard(self, name: str) -> None:
        path = self.directory / name
        try:
            shard = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"the shard {path} is damaged ({str(error).rstrip('.')}): download it again"
            ) from None
        self._open[name] = shard
        for tensor in shard.keys():  # noqa: SIM118 - not a dict
            if tensor in self._file_of:
                raise UserError(
                    f"the tensor {tensor} is in two shards of {self.directory}, "
                    f"{self._file_of[tensor]} and {name}"
                )
            self._file_of[tensor] = name

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read now; UserError when it is absent or cannot be read."""
        if name not in self._file_of:
            raise UserError(f"{self.directory} has no tensor {name}")
        try:
            return self._open[self._file_of[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{name} in {self.directory / self._file_of[name]} cannot be read: {error}"
            ) from None

    def fingerprint(self) -> str:
        """sha256 of config.json and, of every shard, header, size, and 4 KiB of each 16 MiB.

        Which model this is, at the cost of a few thousand reads: other weights under the same
        names are seen, since training changes them everywhere; a lone bit is not.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for name in sorted(self._open):
            path = self.directory / name
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"\0{name}\0{size}\0".encode())
                digest.update(file.read(length))
                for start in range(8 + length, size, 16 << 20):
                    file.seek(start)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        self._files.close()
