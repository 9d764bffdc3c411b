"""What a decoder's configuration says that the family's row, or vLLM, does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.family_row import Architecture
from qig_serve.model_directory import CONFIG_FILE, read_config

_MOST_BLOCKS = 10_000  # transformers makes a list as long as what a stranger's file says


def check_block_count(config: Mapping[str, Any], path: Path) -> None:
    """UserError where config.json, or a part of it, asks for blocks without end."""
    for name, part in (("", config), *config.items()):
        for key in ("num_hidden_layers", "depth") if isinstance(part, Mapping) else ():
            blocks = part.get(key)
            if isinstance(blocks, int) and blocks > _MOST_BLOCKS:
                place = f"{name}.{key}".lstrip(".")
                raise UserError(
                    f"{path}: {place} is {blocks}, and no model has so many blocks: it is damaged; "
                    "copy the published model's file there again"
                )


def check_decoder(directory: Path, arch: Architecture, config: Any) -> None:
    """UserError for a decoder's configuration that cannot be quantized, or not served as computed.

    Before a tensor is read.
    """
    _check_tied(directory, config)
    text = config.get_text_config()
    text_type = text.model_type
    if arch.text_types and text_type not in arch.text_types:
        raise UserError(
            f"{directory} is a {arch.name} model with a {text_type!r} decoder, which is not "
            f"supported; known decoders: {', '.join(arch.text_types)}"
        )
    for field_name, what in arch.refused:
        if getattr(text, field_name, None):
            raise UserError(
                f"{directory} is a {arch.name} model with {what} ({field_name} in config.json), "
                "which is not supported"
            )
    for pair in arch.together:
        first, second = (getattr(text, name, None) for name in pair)
        if bool(first) != bool(second):
            raise UserError(
                f"{directory}: {pair[0]} in config.json is {json.dumps(first)}, and {pair[1]} is "
                f"{json.dumps(second)}: transformers goes by the one, vLLM by the other; give the "
                "config.json that belongs to these weights"
            )
    for path, value in arch.assumed:
        part, _, field_name = path.rpartition(".")
        owner = getattr(config, part) if part else config
        if (found := getattr(owner, field_name, value)) != value:
            raise UserError(
                f"{directory}: {field_name} in config.json is {json.dumps(found)}, which vLLM "
                f"obeys and transformers computes as {json.dumps(value)}: not supported"
            )


def _check_tied(directory: Path, config: Any) -> None:
    """UserError where a config.json with no part for the decoder says of the head what is not read.

    Published PaddleOCR-VL has its decoder's fields at the top: the class takes that part's default.
    """
    raw = read_config(directory)
    said, read = raw.get("tie_word_embeddings"), bool(config.tie_word_embeddings)
    if "text_config" not in raw and said is not None and said != read:
        raise UserError(
            f"{directory / CONFIG_FILE}: tie_word_embeddings is {json.dumps(said)}, and the "
            f"installed transformers, and vLLM with it, read {json.dumps(read)}: put the decoder's "
            'fields under "text_config", tie_word_embeddings among them'
        )
