"""Equalization scales: candidates, their exact stored form, and folding into the previous op.

A smoothing group is a previous op (a norm, or a linear) and the linears that read its output.
Dividing that output by s and multiplying the linears' input columns by s leaves the function as it
is; nothing is added at run time. Sources: SmoothQuant (arXiv 2211.10438), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup

SCALE_FLOOR = 1e-4
SMOOTH_ALPHA = 0.5
"""SmoothQuant's: how much of the difficulty moves from activations to weights."""


def outputs(block: nn.Module, group: SmoothingGroup) -> slice:
    """Those outputs of the group's previous op that its linears read."""
    part, parts = group.part
    size = len(block.get_submodule(group.previous).weight) // parts
    return slice(part * size, (part + 1) * size)


def _head_dim(block: nn.Module, group: SmoothingGroup) -> int:
    """Width of a head of what stands before the group's linears."""
    if group.kind == "norm":  # one weight for all heads
        return len(block.get_submodule(group.previous).weight)
    return int(block.get_submodule(group.previous.rpartition(".")[0]).head_dim)


def share_over_heads(values: torch.Tensor, outputs: int, head_dim: int) -> torch.Tensor:
    """Values of the linears' inputs [K] as values of the previous op's outputs [outputs].

    With grouped-query attention K / outputs query heads read the same key/value head: the mean
    over them. Without, nothing changes.
    """
    if len(values) == outputs:
        return values
    return values.view(outputs // head_dim, -1, head_dim).mean(1).reshape(-1)


def repeat_over_heads(scales: torch.Tensor, inputs: int, head_dim: int) -> torch.Tensor:
    """Inverse direction: [outputs] -> [inputs], a key/value head's scales for its query heads."""
    if len(scales) == inputs:
        return scales
    heads = scales.view(-1, 1, head_dim)
    return heads.expand(-1, inputs // len(scales), -1).reshape(-1)


def power_scales(act_mean: torch.Tensor, exponent: float) -> torch.Tensor:
    """s_c = a_c^r, floored at 1e-4 and normalized by sqrt(max s * min s); fp32, as `act_mean`."""
    scales = act_mean.float().pow(exponent).clamp(min=SCALE_FLOOR)
    return scales / (scales.max() * scales.min()).sqrt()


def smoothquant_scales(act_max: torch.Tensor, weight_max: torch.Tensor) -> torch.Tensor:
    """s_c = max |X_c|^alpha / max |W_c|^(1 - alpha) (arXiv 2211.10438, eq. 4), floored."""
    weights = weight_max.float().clamp(min=1e-5).pow(1 - SMOOTH_ALPHA)
    return (act_max.float().pow(SMOOTH_ALPHA) / weights).clamp(min=SCALE_FLOOR)


def group_scales(
    block: nn.Module, group: SmoothingGroup, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What the linears' columns are multiplied by, [K], if `scales` [outputs] are folded.

    A norm stores its folded weight in the model's dtype. The columns take up what that rounding
    does, so that the full-precision function is preserved to fp32 all the same.
    """
    scales = scales.float()
    if group.kind == "norm":
        before, stored = _norm_weights(block.get_submodule(group.previous), group, scales, dtype)
        kept = before / (stored + group.norm_offset)
        scales = torch.where(kept.isfinite() & (kept > 0), kept, scales)
    inputs = block.get_submodule(group.linears[0]).in_features
    if len(scales) == inputs:
        return scales
    return repeat_over_heads(scales, inputs, _head_dim(block, group))


def output_of_channel(block: nn.Module, group: SmoothingGroup, outputs: int) -> torch.Tensor:
    """Which output of the previous op feeds each input of the linears, int64 [K]."""
    weight = block.get_submodule(group.linears[0]).weight
    each = torch.arange(outputs, device=weight.device)
    if outputs == weight.shape[1]:
        return each
    return repeat_over_heads(each, weight.shape[1], _head_dim(block, group))


def previous_outputs(block: nn.Module, group: SmoothingGroup, values: torch.Tensor) -> torch.Tensor:
    """`values` [K] of the linears' inputs as values of the previous op's outputs."""
    if group.kind == "none":
        return values
    read = outputs(block, group)
    count = read.stop - read.start
    if count == len(values):
        return values
    return share_over_heads(values, count, _head_dim(block, group))


def _norm_weights(
    norm: nn.Module, group: SmoothingGroup, scales: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor that the norm applies now, and the weight stored once `scales` are folded."""
    before = norm.weight.detach().float() + group.norm_offset
    return before, (before / scales - group.norm_offset).to(dtype).float()


@torch.no_grad()
def fold(
    block: nn.Module, group: SmoothingGroup, scales: torch.Tensor, dtype: torch.dtype
) -> list[str]:
    """Folds scales [outputs of the previous op] into a block, in place.

    The block computes in fp32. What is stored in 16 bits (norm weights, biases) is rounded to
    `dtype` here, so that the search goes on with what will be served. Returns the names, in the
    block, of the 16-bit parameters that changed.
    """
    if group.kind == "none":
        return []
    previous, read = block.get_submodule(group.previous), outputs(block, group)
    columns = group_scales(block, group, scales, dtype)  # before the previous op changes
    changed = []
    if group.kind == "norm":
        _, stored = _norm_weights(previous, group, scales, dtype)
        previous.weight.copy_(stored)
        changed.append(f"{group.previous}.weight")
    else:
        previous.weight[read].div_(scales[:, None])
    if getattr(previous, "bias", None) is not None:
        previous.bias[read] = (previous.bias[read] / scales).to(dtype).to(previous.bias.dtype)
        changed.append(f"{group.previous}.bias")
    for name in group.linears:
        block.get_submodule(name).weight.mul_(columns)
    for name in group.readers:
        weight = block.get_submodule(name).weight
        weight.copy_((weight * columns).to(dtype))
        changed.append(f"{name}.weight")
    return changed
