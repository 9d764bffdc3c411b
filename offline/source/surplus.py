"""Tensors of a source that the configuration does not know: each is refused by name.

Nothing is left to chance: what a model's class does not read would be copied into the checkpoint
unseen, or be missing from what was calibrated. A few tables that older files carry, and that are
computed and not read, are copied on purpose.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.model_directory import text_config
from qig_serve.offline.source.tensors import SourceCheckpoint

_COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked", "relative_position_index")
"""Last words of the names of what every implementation computes for itself."""


def check_number_of_blocks(source: SourceCheckpoint, prefix: str, count: int, behind: int) -> None:
    """UserError when the files have more decoder blocks than config.json asks for, or fewer.

    behind: of those that predict further tokens, which the files have all of, or none.
    """
    check_prefix(source, prefix)
    numbers: dict[int, str] = {}
    for name in source:
        number = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and number.isdecimal():
            numbers.setdefault(int(number), name)
    stored = max(numbers, default=-1) + 1
    if stored not in (count, count + behind):
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


def no_blocks(source: SourceCheckpoint, prefixes: Sequence[str]) -> UserError:
    """What is wrong with files in which no decoder block is found under the `prefixes`."""
    looked_for = " and ".join(f"{prefix}0.*" for prefix in prefixes)
    for name in source:
        before = next((name.partition(p)[0] for p in prefixes if f".{p}0." in name), None)
        if before:
            return UserError(
                f"{source.directory}: every name of a tensor begins with {before!r}, which a "
                "training program put there: save the model inside of its wrapper"
            )
    return UserError(
        f"{source.directory}: no decoder block among the tensors; looked for {looked_for}: give "
        "files and configuration of one model"
    )


def check_head(source: SourceCheckpoint, prefix: str, config: Mapping[str, Any]) -> None:
    """UserError when config.json ties the output head to the embedding and the files do not.

    transformers then reads the head, and vLLM takes the embedding for it.
    """
    parts = (config, text_config(config))
    embedding = f"{prefix.removesuffix('layers.')}embed_tokens.weight"
    if embedding not in source or not any(part.get("tie_word_embeddings") for part in parts):
        return
    for name in source:
        if name.endswith("lm_head.weight") and not name.startswith(prefix):
            same = source.shape(name) == source.shape(embedding)
            if not same or not torch.equal(source.tensor(name), source.tensor(embedding)):
                raise UserError(
                    f"{name} in {source.file(name)} is not {embedding}, but config.json says that "
                    "they are one (tie_word_embeddings): set it to false, or leave the tensor out "
                    "of the files"
                )


def outside_blocks(names: Iterable[str], prefix: str, count: int | None = None) -> list[str]:
    """Shortest names that cover all tensors but those of the decoder blocks under `prefix`.

    count: of the blocks, where those behind them are no part of the decoder.
    """
    above = {prefix[: i + 1] for i, c in enumerate(prefix) if c == "."}
    found = set()
    for name in names:
        if name.startswith(prefix):
            number = name.removeprefix(prefix).partition(".")[0]
            if count is not None and int(number) >= count:
                found.add(prefix + number)
            continue
        cut = name.find(".")
        while cut >= 0 and name[: cut + 1] in above:
            cut = name.find(".", cut + 1)
        found.add(name if cut < 0 else name[:cut])
    return sorted(found)


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED


def _unknown(source: SourceCheckpoint, name: str) -> UserError:
    place = source.file(name) if name in source else source.directory
    what = "bias" if name.endswith(".bias") else "tensor"
    return UserError(
        f"{name} in {place} is a {what} that config.json does not know: give the config.json that "
        "belongs to these weights, or leave the tensor out of the files"
    )
