"""The tensors of InternVL2 as published: what becomes of each, and whether all are there.

From names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.model_directory import CONFIG_FILE, cannot_be_loaded
from qig_serve.offline.source.tensors import SourceCheckpoint

_ONE_MODEL = "give files and configuration of one model"

_DECODER = "language_model.model."
_TOWER = "vision_tower."
_PLACES = {
    "BLOCK": (r"language_model.model.layers.(\d+)", r"language_model.model.layers.\1"),
    "LAYER": (r"vision_model.encoder.layers.(\d+)", r"vision_tower.encoder.layer.\1"),
    "EMBEDDINGS": ("vision_model.embeddings", "vision_tower.embeddings"),
}
# Name in the source, name in the port; what is not here nor split below is refused.
_TABLE = r"""
language_model.model.tok_embeddings.weight   language_model.model.embed_tokens.weight
language_model.model.norm.weight             language_model.model.norm.weight
language_model.output.weight                 language_model.lm_head.weight
BLOCK.attention.wo.(weight|bias)             BLOCK.self_attn.o_proj.\2
BLOCK.feed_forward.w1.weight                 BLOCK.mlp.gate_proj.weight
BLOCK.feed_forward.w3.weight                 BLOCK.mlp.up_proj.weight
BLOCK.feed_forward.w2.weight                 BLOCK.mlp.down_proj.weight
BLOCK.attention_norm.weight                  BLOCK.input_layernorm.weight
BLOCK.ffn_norm.weight                        BLOCK.post_attention_layernorm.weight
EMBEDDINGS.class_embedding                   EMBEDDINGS.cls_token
EMBEDDINGS.position_embedding                EMBEDDINGS.position_embeddings
EMBEDDINGS.patch_embedding.(weight|bias)     EMBEDDINGS.patch_embeddings.projection.\1
LAYER.attn.proj.(weight|bias)                LAYER.attention.projection_layer.\2
LAYER.attn.([qk])_norm.weight                LAYER.attention.\2_norm.weight
LAYER.ls([12])                               LAYER.lambda_\2
LAYER.mlp.(fc[12]).(weight|bias)             LAYER.mlp.\2.\3
LAYER.norm1.(weight|bias)                    LAYER.layernorm_before.\2
LAYER.norm2.(weight|bias)                    LAYER.layernorm_after.\2
mlp1.0.(weight|bias)                         multi_modal_projector.layer_norm.\1
mlp1.1.(weight|bias)                         multi_modal_projector.linear_1.\1
mlp1.3.(weight|bias)                         multi_modal_projector.linear_2.\1
"""


def _renames() -> Iterator[tuple[re.Pattern[str], str]]:
    """(pattern of source names, name in the port) of each line of the table."""
    for line in _TABLE.strip().splitlines():
        source, target = line.split()
        for place, (old, new) in _PLACES.items():
            source, target = source.replace(place, old), target.replace(place, new)
        yield re.compile(source.replace(".", r"\.") + "$"), target


_RENAMES = tuple(_renames())
_WQKV = re.compile(r"language_model\.model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)$")
_VISION_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")


def convert_tensor(
    name: str, tensor: torch.Tensor, heads: int, kv_heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs of the port that one source tensor becomes.

    wqkv [(heads + 2 kv_heads) * D, C]: for every key/value head its query heads, its key, its
    value. The tower's qkv [3 C, C]: all queries, all keys, all values. UserError for other names.
    """
    if match := _WQKV.match(name):
        groups = heads // kv_heads
        split = tensor.unflatten(0, (kv_heads, groups + 2, -1))
        parts = (split[:, :groups], split[:, groups], split[:, groups + 1])
        for letter, part in zip("qkv", parts, strict=True):
            target = f"{_DECODER}layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"
            yield target, part.reshape(-1, *tensor.shape[1:]).contiguous()
        return
    if match := _VISION_QKV.match(name):
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            target = f"{_TOWER}encoder.layer.{match[1]}.attention.{letter}_proj.{match[2]}"
            yield target, part.contiguous()
        return
    for pattern, target in _RENAMES:
        if pattern.match(name):
            yield pattern.sub(target, name), tensor
            return
    raise UserError(
        f"tensor {name} belongs to no InternVL2 model that can be converted: give the model as "
        "published"
    )


def check_tensors(source: SourceCheckpoint, config: dict[str, Any]) -> None:
    """UserError unless the tensors become those of the port that `config` describes.

    By names and shapes, before any is read.
    """
    where, text = source.directory, config["text_config"]
    wanted = _port_shapes(config, where)
    for name in source:
        empty = torch.empty(source.shape(name), device="meta")
        stored = f"{name} in {source.file(name)}, {list(empty.shape)},"
        heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
        try:
            parts = list(convert_tensor(name, empty, heads, kv_heads))
        except (RuntimeError, ValueError, TypeError):
            raise UserError(
                f"{stored} cannot be cut into queries, keys and values ({heads} heads and "
                f"{kv_heads} key/value heads in {CONFIG_FILE}): {_ONE_MODEL}"
            ) from None
        for target, part in parts:
            if target not in wanted:
                raise UserError(f"{stored} is not known to {CONFIG_FILE}: {_ONE_MODEL}")
            if (shape := wanted.pop(target)) != tuple(part.shape):
                raise UserError(
                    f"{stored} gives {target} {list(part.shape)}, and {CONFIG_FILE} asks for "
                    f"{list(shape)}: {_ONE_MODEL}"
                )
    if text["tie_word_embeddings"]:
        wanted.pop("language_model.lm_head.weight", None)
    if wanted:
        raise UserError(
            f"{where} has no tensor for {min(wanted)}: the checkpoint is incomplete; download it "
            "again"
        )


def _port_shapes(config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """The port's tensors by the names that published files of it have."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            made = AutoConfig.for_model(config["model_type"], **fields)
            model = AutoModelForImageTextToText.from_config(made)
    except Exception as error:  # its classes raise anything about a stranger's values
        raise cannot_be_loaded(where, error) from None
    shapes = {}
    for name, tensor in model.state_dict().items():
        name = f"language_model.{name}" if name.startswith("lm_head.") else name
        name = name.replace("model.language_model.", _DECODER).removeprefix("model.")
        shapes[name] = tuple(tensor.shape)
    return shapes
