"""Tensors of a source that the configuration does not know: each is refused by name.

Nothing is left to chance: what a model's class does not read would be copied into the checkpoint
unseen, or be missing from what was calibrated. A few tables that older files carry, and that are
computed and not read, are copied on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from qig_serve.errors import UserError
from qig_serve.offline.source.tensors import SourceCheckpoint

_COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked", "relative_position_index")
"""Last words of the names of what every implementation computes for itself."""


def check_number_of_blocks(source: SourceCheckpoint, prefix: str, count: int) -> None:
    """UserError when the files have more decoder blocks than config.json asks for, or fewer."""
    check_prefix(source, prefix)
    numbers: dict[int, str] = {}
    for name in source:
        number = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and number.isdecimal():
            numbers.setdefault(int(number), name)
    stored = max(numbers, default=-1) + 1
    if stored != count:
        raise UserError(
            f"{source.directory} has {stored} decoder blocks in its files ({numbers[stored - 1]}), "
            f"but num_hidden_layers in config.json is {count}: give files and configuration of "
            "one model"
        )


def check_other_names(source: SourceCheckpoint, prefixes: Iterable[str]) -> None:
    """UserError when the blocks are in the files a second time, under older or newer names."""
    others = tuple(prefixes)
    for name in source:
        if name.startswith(others):
            raise _unknown(source, name)


def check_prefix(source: SourceCheckpoint, prefix: str) -> None:
    """UserError that names a tensor under the decoder's prefix which is of no block."""
    for name in source:
        if name.startswith(prefix) and not name.removeprefix(prefix).partition(".")[0].isdecimal():
            raise _unknown(source, name)


def check_block(source: SourceCheckpoint, prefix: str, known: Collection[str]) -> None:
    """UserError that names a tensor of the block under `prefix` which its class does not have."""
    for name in source:
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and inner not in known and not _is_computed(inner):
            raise _unknown(source, name)


def check_outside(source: SourceCheckpoint, unread: Iterable[str]) -> None:
    """The same of all but the decoder blocks; `unread` is what transformers did not use."""
    for name in sorted(unread):
        if not _is_computed(name):
            raise _unknown(source, name)


def check_served_names(source: SourceCheckpoint, served_name: Callable[[str], str]) -> None:
    """UserError when the files have a tensor twice, by an older and by a newer name."""
    by_name: dict[str, str] = {}
    for name in source:
        first = by_name.setdefault(served_name(name), name)
        if first != name:
            raise UserError(
                f"{source.directory} has one tensor by two names, {first} and {name}: leave one "
                "of them out of the files"
            )


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED


def _unknown(source: SourceCheckpoint, name: str) -> UserError:
    place = source.file(name) if name in source else source.directory
    what = "bias" if name.endswith(".bias") else "tensor"
    return UserError(
        f"{name} in {place} is a {what} that config.json does not know: give the config.json that "
        "belongs to these weights, or leave the tensor out of the files"
    )
