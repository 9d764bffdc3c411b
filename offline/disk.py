"""Writing files: whole or not at all, and in one sentence what a full or read-only disk does."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qig_serve.errors import UserError
from qig_serve.formats import FORMAT_VERSION
from qig_serve.hashes import HASHES_FILE, file_sha256
from qig_serve.model_directory import INDEX_FILE

if TYPE_CHECKING:
    import torch

_NO_PLACE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""What the system says where nothing may be written, and where there is no such place."""
SHARD_BYTES = 2 << 30
"""Models are copied in shards of about this size, so that memory stays flat."""


class ResumableError(UserError):
    """A failure that says nothing against the work done so far: `--resume` goes on from it."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, `path` is written: ResumableError on a full disk, UserError where it may not be."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from None
        if error.errno in _NO_PLACE:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        raise
    except Exception as error:
        # safetensors and tokenizers report what the system said in words of their own.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _full(path) from None
        raise


def _full(path: Path) -> ResumableError:
    return ResumableError(
        f"the disk is full ({path}): free some space and run the command again (quantize goes on "
        "with --resume if a block was finished)"
    )


def sync(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Beside the target, then renamed onto it: no half file is ever seen."""
    partial = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file of contiguous tensors on the host, as `write_text` writes."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".tmp")
    with disk_errors(path):
        save_file(tensors, partial, metadata={"format": "pt"})
        # safetensors writes 600, whatever the umask
        partial.chmod(path.parent.stat().st_mode & 0o666)
        sync(partial)
        partial.rename(path)


def save_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, prefix: str
) -> list[Path]:
    """Named tensors as files of about SHARD_BYTES, PREFIX-00000.safetensors and so on."""
    shards: list[Path] = []
    part: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        shards.append(directory / f"{prefix}-{len(shards):05d}.safetensors")
        save_shard(part, shards[-1])
        part.clear()

    for name, tensor in tensors:
        if part and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        flush()
    return shards


def number_shards(shards: Sequence[Path]) -> None:
    """Renames a model's shards to model-00001-of-N and so on, and writes their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for i, path in enumerate(shards, start=1):
        final = path.with_name(f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        if path != final:
            path.rename(final)
        with final.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                weight_map[name] = final.name
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(shards[0].with_name(INDEX_FILE), json.dumps(index, indent=2) + "\n")


def write_hashes(directory: Path, skipped: Collection[Path] = ()) -> None:
    """sha256 of every file of a checkpoint but HASHES_FILE itself and `skipped`."""
    files = {
        path.relative_to(directory).as_posix(): file_sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != HASHES_FILE and path not in skipped
    }
    _write_hash_list(directory, files)


def replace_files(directory: Path, texts: Mapping[str, str]) -> None:
    """Gives files of a finished checkpoint, by name, another text, and all of them at once.

    A killed process leaves the old checkpoint or the new one, hashes included: what changes is a
    copy made of links, hidden beside it, whose name is then exchanged with the directory's.
    ResumableError and UserError as of `disk_errors`, and the old checkpoint then.
    """
    directory = directory.resolve()
    copy = directory.with_name(f".{directory.name}.new")
    with disk_errors(copy):
        shutil.rmtree(copy, ignore_errors=True)  # a killed process leaves its own
        try:
            shutil.copytree(directory, copy, copy_function=_link)
            files = json.loads((copy / HASHES_FILE).read_text(encoding="utf-8"))["files"]
            for name, text in texts.items():
                write_text(copy / name, text)
                files[name] = file_sha256(copy / name)
            _write_hash_list(copy, dict(sorted(files.items())))
            sync(copy)
            _exchange(copy, directory)
            sync(directory.parent)
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _write_hash_list(directory: Path, files: Mapping[str, str]) -> None:
    hashes = {"format_version": FORMAT_VERSION, "files": files}
    write_text(directory / HASHES_FILE, json.dumps(hashes, indent=1) + "\n")


def _link(source: str, target: str) -> str:
    """A second name of a file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _exchange(one: Path, other: Path) -> None:
    """Two directories take each other's name in one step.

    In two steps, the first of which leaves nothing under `other`, where the system or the file
    system knows no exchange.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    if rename and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    old = one.with_name(f"{one.name}.old")
    other.rename(old)
    one.rename(other)
    old.rename(one)
