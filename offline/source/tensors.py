"""Reads a source model's safetensors, a tensor at a time, and refuses what is broken, by name.

Opening reads headers only. Tensors are read into memory of their own and not mapped: pages of a
mapped file stay resident while it is open, so that the process would grow with the model. Names
are the files' own until `rename`: transformers renames modules from version to version, published
checkpoints keep their tensors' names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qig_serve.errors import UserError
from qig_serve.model_directory import INDEX_FILE
from qig_serve.weight_files import check_tensor, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    columns: slice | None = None
    """Where the file has a matrix the other way round: those of its columns that are the rows."""


class SourceCheckpoint:
    """The weights of a Hugging Face directory: names, shapes, and lazily the tensors."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._files = ExitStack()
        self._open: dict[str, BufferedReader] = {}
        self._file_of: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._split: dict[str, tuple[int, Sequence[str], bool]] = {}
        found = weight_files(self.directory)
        for name in found.names:
            self._add_shard(name)
        missing = [n for n, file in found.weight_map.items() if self._file_of.get(n) != file]
        if missing:
            raise UserError(
                f"{self.directory / INDEX_FILE} names the tensor {missing[0]}, which is not in "
                f"{found.weight_map[missing[0]]}: the checkpoint is incomplete; download it again"
            )

    def _add_shard(self, name: str) -> None:
        path = self.directory / name
        try:
            with safe_open(path, framework="pt") as shard:  # checks the header against the file
                tensors = list(shard.keys())
            file = self._files.enter_context(path.open("rb"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"the shard {path} is damaged ({str(error).rstrip('.')}): download it again"
            ) from None
        self._open[name] = file
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for tensor in tensors:
            if tensor in self._file_of:
                raise UserError(
                    f"the tensor {tensor} is in two shards of {self.directory}, "
                    f"{self._file_of[tensor]} and {name}"
                )
            self._file_of[tensor] = name
            entry = header[tensor]
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            self._entries[tensor] = _Entry(entry["dtype"], shape, 8 + length + start, end - start)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return self._entries[name].shape

    def check_full_precision(self) -> None:
        """UserError that names the first tensor which a full-precision model does not have."""
        for name in self:
            check_tensor(self.directory, self._file_of[name], name, self._entries[name].dtype)

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.directory / self._file_of[name]

    def dtype(self, name: str) -> str:
        """The tensor's type, as its header names it."""
        return self._entries[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read now; UserError when it is absent or cannot be read."""
        if name not in self._file_of:
            raise UserError(f"{self.directory} has no tensor {name}")
        entry, file = self._entries[name], self._open[self._file_of[name]]
        where = f"{name} in {self.directory / self._file_of[name]} cannot be read"
        if entry.dtype not in _DTYPES:
            raise UserError(f"{where}: its type {entry.dtype} is not that of a model's weights")
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            file.seek(entry.start)
            got = file.readinto(raw.numpy())
        except OSError as error:
            raise UserError(f"{where}: {error}") from None
        if got != entry.nbytes:
            raise UserError(f"{where}: the file has become shorter since it was opened")
        stored = raw.view(_DTYPES[entry.dtype])
        if entry.columns is None:
            return stored.reshape(entry.shape)
        return stored.reshape(entry.shape[1], -1)[:, entry.columns].T.contiguous()

    def rename(self, served_name: Callable[[str], str]) -> None:
        """Has every tensor go by another name; UserError where two would have the same."""
        found: dict[str, str] = {}
        for name in self:
            first = found.setdefault(served_name(name), name)
            if first != name:
                raise UserError(
                    f"{self.directory} has one tensor by two names, {first} and {name}: leave one "
                    "of them out of the files"
                )
        self._file_of = {new: self._file_of[name] for new, name in found.items()}
        self._entries = {new: self._entries[name] for new, name in found.items()}

    def split(self, name: str, parts: Sequence[str], transposed: bool) -> None:
        """Has a tensor [E, P N, K] (transposed: [E, K, P N]) go by the names of its matrices.

        `parts` are the E P names of [N, K] each, P (1 or 2) for every one of E. UserError where
        one of them is in the files beside it.
        """
        entry, file = self._entries.pop(name), self._file_of.pop(name)
        count, rows, k = entry.shape
        self._split[name] = count, parts, transposed
        if transposed:
            rows, k = k, rows
        each = len(parts) // count
        n = rows // each
        size = entry.nbytes // count
        for i, part in enumerate(parts):
            if part in self._file_of:
                raise UserError(
                    f"{self.directory} has one tensor by two names, {part} and inside of {name}: "
                    "leave one of them out of the files"
                )
            e, p = divmod(i, each)
            start = entry.start + e * size
            self._file_of[part] = file
            self._entries[part] = (
                _Entry(entry.dtype, (n, k), start, size, slice(p * n, (p + 1) * n))
                if transposed
                else _Entry(entry.dtype, (n, k), start + p * size // each, size // each)
            )

    def leave_out(self, name: str) -> None:
        """Has a tensor count as not in the files."""
        del self._entries[name], self._file_of[name]

    def joined(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, with matrices that `split` has named as they lie in the files."""
        found = dict(tensors)
        for name, (count, parts, transposed) in self._split.items():
            if parts[0] not in tensors:
                continue
            matrices = torch.stack([found.pop(part) for part in parts])  # [E P, N, K]
            whole = matrices.unflatten(0, (count, -1)).flatten(1, 2)  # [E, P N, K]
            found[name] = whole.transpose(1, 2).contiguous() if transposed else whole
        return found

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


def check_values(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> None:
    """UserError if a weight is not finite, or would not be in `dtype`, the model's."""
    if not tensor.numel():
        return
    # One pass without a copy, which of an embedding would be gigabytes; NaN comes through.
    low, high = (float(end) for end in torch.aminmax(tensor))
    largest = max(-low, high)
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{where} holds NaN or infinity: the checkpoint is damaged")
    if dtype.is_floating_point and largest > torch.finfo(dtype).max:
        raise UserError(
            f"{where} holds {largest:.3g}, more than {dtype}, the dtype of config.json, can: "
            "set that to bfloat16"
        )
