"""The packed linears among the tensors of a block's shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def packed_linears(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """{linear: {suffix: tensor}} of formats.tensor_specs, and the tensors that are not packed."""
    linears: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, suffix = name.rpartition(".")
        if f"{linear}.weight_packed" in tensors and suffix.startswith("weight_"):
            linears.setdefault(linear, {})[suffix] = tensor
        else:
            rest[name] = tensor
    return linears, rest
