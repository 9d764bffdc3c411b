"""Whether a model's MLP is stored wider than it was published (mlp_padding.py), and how wide."""

from __future__ import annotations

import copy
from typing import Any

from qig_serve.formats import GROUP_SIZE, QuantScheme
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.source.mlp_padding import MlpPadding
from qig_serve.tensor_parallel import why_refused

SIZES = (8, 4, 2)
"""Tensor-parallel sizes that padding makes room for: the largest that the rest of a model allows.

Not 16: that many devices serve models of several hundred billion weights."""
LARGE = 20e9
"""Weights of a decoder's linears from which a model is padded unasked.

Below, they take less than 10 GB in 4 bits: a device that runs such a model at all holds it, with
room for the cache, and padding would only cost its share of every product."""


def choose(
    loaded: LoadedModel, scheme: QuantScheme, asked: bool | None
) -> tuple[MlpPadding | None, str]:
    """How the MLP of a model is padded, or None; and what to say where that was asked for in vain.

    asked: True or False as the recipe says; None leaves it to the size of the model.
    """
    if loaded.has_experts:
        return (
            None,
            "the MLP is not padded: experts are stored as wide as they are" if asked else "",
        )
    if asked is False or (asked is None and decoder_weights(loaded) < LARGE):
        return None, ""
    padded = padded_width(loaded.config, scheme)
    if padded is None:
        reason = "its width is not what keeps devices from sharing it"
        return None, f"the MLP is not padded: {reason}" if asked else ""
    rows, columns = _linears(loaded)
    padding = MlpPadding(int(loaded.text_config.intermediate_size), padded, rows, columns)
    if reason := _why_not(loaded, padding):
        return None, f"the MLP is not padded: {reason}"
    return padding, ""


def padded_width(config: Any, scheme: QuantScheme) -> int | None:
    """The MLP's width with which the most of SIZES fit; None where its own is as good.

    Whole groups for each device, whatever the scheme: they are what the kernels read fastest.
    """
    for size in SIZES:
        whole = size * GROUP_SIZE
        wider = copy.deepcopy(config)
        text = wider.get_text_config()
        text.intermediate_size += -text.intermediate_size % whole
        if why_refused(wider, scheme.cut_multiple, size, split_tower=False) is None:
            fits = why_refused(config, scheme.cut_multiple, size, split_tower=False) is None
            return None if fits else int(text.intermediate_size)
    return None


def decoder_weights(loaded: LoadedModel) -> int:
    """Weights of the linears that are quantized."""
    return sum(block_weights(loaded, index) for index in range(loaded.num_blocks))


def block_weights(loaded: LoadedModel, index: int) -> int:
    """Those of one block."""
    total = 0
    for group in loaded.groups(loaded.meta_block(index)):
        for linear in group.linears:
            n, k = loaded.source.shape(loaded.source_name(index, f"{linear}.weight"))
            total += n * k
    return total


def _linears(loaded: LoadedModel) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the linears that make the MLP's channels, and of those that read them."""
    groups = loaded.groups(loaded.meta_block(0))
    found = {group.name: frozenset(group.linears) for group in groups}
    return found["gate_up"], found["down"]


def _why_not(loaded: LoadedModel, padding: MlpPadding) -> str:
    """Why a model's MLP cannot be stored wider; empty if it can."""
    if loaded.blocks_behind or any("mtp" in name.split(".") for name in loaded.source):
        return "the multi-token head, which stays as it is, would have to be as wide"
    for index in range(loaded.num_blocks):
        for linear in (*padding.rows, *padding.columns):
            name = loaded.source_name(index, f"{linear}.weight")
            n, k = loaded.source.shape(name)
            wide = k if linear in padding.columns else n
            first = loaded.source.shape(loaded.source_name(0, f"{linear}.weight"))
            if wide not in (padding.width, 2 * padding.width) or (n, k) != first:
                return f"{name} is {[n, k]}, and config.json says {padding.width} channels"
    return ""
