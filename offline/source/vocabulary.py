"""The tables outside of the blocks that are as long as the vocabulary: embeddings and head.

They may be stored in 8 bits, rounded to nearest with one scale per row. A tied model has one table
for embedding and head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qig_serve.formats import VOCABULARY_SCHEME, unsupported_shape
from qig_serve.manifest import EMBEDDING, HEAD, PER_BLOCK
from qig_serve.offline.source.loaded_model import BlockInputs, LoadedModel
from qig_serve.packing import fake_quantize


def in_eight_bits(loaded: LoadedModel, head: int, embeddings: int) -> tuple[list[str], str]:
    """Names in the files of what is stored in 8 bits, given the bits asked for, and what to say.

    What a model has no usable table for stays in 16 bits; the text says why, or is empty.
    """
    per_block = f"{_beside(loaded)}{PER_BLOCK}"
    if embeddings == 8 and f"{per_block}.weight" in loaded.source:
        found, note = _of_vocabulary(loaded, head, embeddings)
        return [*found, per_block], note
    return _of_vocabulary(loaded, head, embeddings)


def _of_vocabulary(loaded: LoadedModel, head: int, embeddings: int) -> tuple[list[str], str]:
    """The same of output head and embedding."""
    embedding, heads = _stored(loaded)
    tied = loaded.is_tied
    if tied and heads:
        return [], f"{heads[0]} is stored beside the embedding that it is tied to: both stay as is"
    note = ""
    if loaded.arch.embedding_as_is and embeddings == 8:
        note = (
            f"{embedding} stays in 16 bits: vLLM does not take it otherwise in {loaded.arch.name}"
        )
        embeddings = 16
        if tied:
            return [], note
    wanted = {embedding: embeddings}
    if tied:
        if head != embeddings:
            reason = "output head and embedding are one tensor: it stays in 16 bits unless both "
            return [], reason + "may have 8"
    else:
        wanted |= dict.fromkeys(heads, head)
    found = []
    for name, bits in wanted.items():
        if bits != 8:
            continue
        if unsupported := unsupported_shape(
            VOCABULARY_SCHEME, *loaded.source.shape(f"{name}.weight")
        ):
            return [], f"{name} stays in 16 bits: {unsupported}"
        found.append(name)
    return found, note


def _beside(loaded: LoadedModel) -> str:
    """What stands before the names of the files' tensors that lie beside the blocks."""
    return loaded.source_prefix.removesuffix("layers.")


def _stored(loaded: LoadedModel) -> tuple[str, list[str]]:
    """The modules' names in the files: the embedding, and the head unless it is tied."""
    heads = [
        name.removesuffix(".weight")
        for name in loaded.source
        if name.endswith(f"{HEAD}.weight") and not name.startswith(loaded.source_prefix)
    ]
    return f"{_beside(loaded)}{EMBEDDING}", heads


def rounded_inputs(
    loaded: LoadedModel, inputs: Mapping[str, torch.Tensor], before: BlockInputs
) -> BlockInputs:
    """What the blocks are given for a batch by the model as it is stored.

    before: what the original gives, which is the same where the embedding is not in 8 bits.
    """
    rounded = [loaded.model.get_input_embeddings()] * has_in_8_bits(loaded, EMBEDDING)
    if has_in_8_bits(loaded, PER_BLOCK):
        rounded.append(loaded.model.get_submodule(f"{loaded.arch.decoder}.{PER_BLOCK}"))
    if not rounded:
        return before.apart()
    hooks = [module.register_forward_hook(_look_up_rounded) for module in rounded]
    try:
        return before.embedded_as(loaded.block_inputs(inputs))
    finally:
        for hook in hooks:
            hook.remove()


def has_in_8_bits(loaded: LoadedModel, ending: str) -> bool:
    """Whether a table whose name so ends is to be stored in 8 bits."""
    return any(name.endswith(ending) for name in loaded.eight_bit)


def _look_up_rounded(module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
    """The module's own forward on the rows that are asked for, rounded: rows have their scales."""
    ids, places = args[0].unique(return_inverse=True)
    rows: Any = copy.copy(module)
    weight = fake_quantize(module.weight[ids], VOCABULARY_SCHEME)
    rows._parameters = {"weight": nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)}
    rows.padding_idx = None
    return rows.forward(places)
