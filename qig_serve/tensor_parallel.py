"""Over how many devices tensor parallelism can split a quantized model, and what is in the way.

The one rule, for the model card, `doctor`, the server's start and the messages of the plugin.
vLLM shares out query heads and the vision tower's heads, shares out or repeats key/value heads,
and cuts the inputs of o and down, where a part must hold whole groups of scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qig_serve.architectures import ARCHITECTURES
from qig_serve.errors import UserError

SIZES = (1, 2, 4, 8, 16)
"""The sizes that are looked at."""
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "w2")
"""Linears whose inputs are cut; of the others the outputs are."""


def why_refused(
    config: Any,
    cut_multiple: int,
    size: int,
    split_tower: bool = True,
    split_experts: bool = True,
) -> str | None:
    """Why a model cannot be split over `size` devices; None if it can.

    config: the model's Hugging Face configuration. cut_multiple: what each part of a quantized
    linear's inputs must be a multiple of (`QuantScheme.cut_multiple`). split_tower: whether the
    vision tower is split too, as vLLM does by default (--mm-encoder-tp-mode). split_experts:
    whether experts are; not where whole ones are shared out (--enable-expert-parallel).
    UserError for a configuration without attention heads.
    """
    text = config.get_text_config()
    reasons, inputs = [], _mlp_widths(text, split_experts)
    for before, block in enumerate(_kinds_of_block(text)):
        heads = int(block.num_attention_heads)
        if heads < 1:
            raise UserError(
                f"config.json: num_attention_heads is {heads}: give the one of these weights"
            )
        kv_heads = int(getattr(block, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(block, "head_dim", None) or block.hidden_size // heads)
        if heads % size:
            reasons.append(f"{heads} query heads")
        if kv_heads % size and size % kv_heads:
            reasons.append(f"{kv_heads} key/value heads")
        inputs.insert(before, ("o", heads * head_dim))
    if key_heads := getattr(text, "linear_num_key_heads", None):
        values = text.linear_num_value_heads
        inputs.append(("out of gated delta-net", int(values * text.linear_value_head_dim)))
        reasons += [
            f"{count} {what} heads of gated delta-net"
            for count, what in ((key_heads, "key"), (values, "value"))
            if count % size
        ]
    if "conv" in (getattr(text, "layer_types", None) or ()):
        inputs.append(("out of convolution", int(text.hidden_size)))
    for name, k in inputs:
        if size > 1 and k % (size * cut_multiple):
            reasons.append(f"{k} inputs of {name} in multiples of {cut_multiple}")
    tower = _tower_heads(config) if split_tower else 0
    if tower % size:
        reasons.append(f"{tower} heads of the vision tower")
    return ", ".join(dict.fromkeys(reasons)) + f" cannot be split {size} ways" if reasons else None


def refused_sizes(
    config: Any, cut_multiple: int, split_tower: bool = True, split_experts: bool = True
) -> dict[int, str]:
    """Those of SIZES that do not fit -> why; arguments as of `why_refused`."""
    split = split_tower, split_experts
    reasons = {size: why_refused(config, cut_multiple, size, *split) for size in SIZES}
    return {size: why for size, why in reasons.items() if why is not None}


def fitting_sizes(refused: Mapping[int, str]) -> list[int]:
    """Those of SIZES that are not refused."""
    return [size for size in SIZES if size not in refused]


def sizes_for_inputs(k: int, cut_multiple: int) -> list[int]:
    """Those of SIZES that split K inputs into parts of whole groups."""
    return [size for size in SIZES if size == 1 or k % (size * cut_multiple) == 0]


def shard(name: str, n: int, k: int, size: int) -> tuple[int, int]:
    """[N, K] of one device's part of the linear `name` of [n, k]."""
    return (n, k // size) if name.endswith(_ROW_PARALLEL) else (n // size, k)


def in_words(sizes: Sequence[int], refused: Mapping[Any, str]) -> str:
    """For people: "1, 2, 4; not 8, 16 (28 query heads cannot be split 8 ways)".

    What is in the way of one size is in the way of its multiples, so the smallest's is enough.
    """
    text = ", ".join(map(str, sizes)) or "none"
    if not refused:
        return text
    why = refused[min(refused, key=int)]
    return f"{text}; not {', '.join(map(str, sorted(refused, key=int)))} ({why})"


def _mlp_widths(text: Any, split_experts: bool) -> list[tuple[str, int]]:
    """Inputs of the last linear of an MLP, or of experts, and what it is called.

    LFM2 makes them from what its configuration says.
    """
    beside = getattr(text, "enable_moe_block", None)  # an MLP and experts in every block, or not
    found = []
    if beside is not False and (expert := getattr(text, "moe_intermediate_size", None)):
        found = [("an expert's down", int(expert))] if split_experts else []
        shared = getattr(text, "shared_expert_intermediate_size", None)
        if shared := shared or expert * (getattr(text, "n_shared_experts", None) or 0):
            found.append(("the shared expert's down", int(shared)))
        if not beside and not getattr(text, "first_k_dense_replace", None):
            return found
    width = int(text.intermediate_size)
    if getattr(text, "block_auto_adjust_ff_dim", False):
        width = int(text.block_ffn_dim_multiplier * int(2 * width / 3))
        width += -width % int(text.block_multiple_of)
    return [*found, ("down", width)]


def _kinds_of_block(text: Any) -> list[Any]:
    """The decoder's configuration; of each kind of block, where heads differ among them."""
    if not getattr(text, "is_heterogeneous", False):
        return [text]
    kinds = sorted(set(text.layer_types))
    return [text.per_layer_config[text.layer_types.index(kind)] for kind in kinds]


def _tower_heads(config: Any) -> int:
    """Attention heads of the vision tower that must divide; 0 where none must."""
    vision = getattr(config, "vision_config", None)
    family = ARCHITECTURES.get(config.model_type)
    if vision is None or (family is not None and not family.splits_tower):
        return 0
    heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None)
    return int(heads or 0)
