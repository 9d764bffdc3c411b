"""What a decoder's configuration says that the family's row, or vLLM, does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
    window = getattr(text, "sliding_window", None)
    if window is not None and window < 1:
        raise UserError(
            f"{directory}: sliding_window in config.json is {window}, which is none for vLLM and "
            "no token at all for transformers: write null there"
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "use_sliding_window", None) and kinds != {"sliding_attention"}:
        raise UserError(
            f"{directory}: use_sliding_window in config.json is true, and layer_types has "
            f"{json.dumps(sorted(kinds))}: vLLM would put the window on every block, transformers "
            "does not; give the config.json that belongs to these weights"
        )
    for path, value in arch.assumed:
        part, _, field_name = path.rpartition(".")
        owner = getattr(config, part) if part else config
        if (found := getattr(owner, field_name, value)) != value:
            raise UserError(
                f"{directory}: {field_name} in config.json is {json.dumps(found)}, which vLLM "
                f"obeys and transformers computes as {json.dumps(value)}: not supported"
            )


def check_positions(directory: Path, rotary: Any, config: Any) -> None:
    """UserError where vLLM would turn queries and keys by other positions than transformers does.

    Of M-RoPE, vLLM knows what config.json says of `mrope_section` and `mrope_interleaved`;
    transformers has an assumption where the one is missing, and never reads the other.

    rotary: the decoder's module that makes cosines and sines from positions.
    """
    if not hasattr(rotary, "mrope_section"):
        return
    rope: dict[str, Any] = config.get_text_config().rope_parameters or {}
    interleaved = rope.get("mrope_interleaved", False)
    sections: Any = rope.get("mrope_section")
    size = rotary.inv_freq.numel()
    valid = isinstance(sections, list) and [type(n) for n in sections] == [int] * 3
    if not valid or sum(sections) != size:
        raise UserError(
            f"{directory}: mrope_section in config.json is {json.dumps(sections)}, and must be "
            f"three whole numbers with the sum {size}, by which vLLM places pictures: copy the "
            "published model's config.json there again"
        )
    place = torch.zeros(1, 1, 1, device=rotary.inv_freq.device)
    ids = torch.eye(3, dtype=torch.int64, device=place.device)[:, :, None]
    sines = rotary(place.expand(3, 1, 1), ids)[1][:, 0]  # [axis, each frequency twice]
    halves = torch.equal(sines[:, :size], sines[:, size:])
    turned = (sines[:, :size] if halves else sines[:, ::2]) != 0
    wanted = torch.zeros_like(turned)
    if interleaved:
        for axis in (1, 2):
            wanted[axis, axis : sections[axis] * 3 : 3] = True
        wanted[0] = ~wanted.any(0)
    else:
        wanted[torch.arange(3).repeat_interleave(torch.tensor(sections)), torch.arange(size)] = True
    if not torch.equal(turned, wanted):
        raise UserError(
            f"{directory}: mrope_interleaved in config.json is {json.dumps(bool(interleaved))}, "
            f"or missing, which vLLM obeys; these models need {json.dumps(not interleaved)}: write "
            "that beside mrope_section"
        )


def _check_tied(directory: Path, config: Any) -> None:
    """UserError where a config.json with no part for the decoder says of the head what is not read.

    PaddleOCR-VL was first published with its decoder's fields at the top, where transformers 5 has
    a part for them: the class takes that part's default.
    """
    raw = read_config(directory)
    said, read = raw.get("tie_word_embeddings"), bool(config.tie_word_embeddings)
    if "text_config" not in raw and said is not None and said != read:
        raise UserError(
            f"{directory / CONFIG_FILE}: tie_word_embeddings is {json.dumps(said)}, and the "
            f"installed transformers, and vLLM with it, read {json.dumps(read)}: put the decoder's "
            'fields under "text_config", tie_word_embeddings among them'
        )
