"""Rounds the linears of one equalized block, in the order in which it runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qig_serve.offline.architectures import SmoothingGroup
from qig_serve.offline.capture import catch_call, check_finite, quantized_activations
from qig_serve.offline.equalize import GroupResult
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.rounding import (
    LinearStats,
    RoundedLinear,
    RoundingOptions,
    StatsAccumulator,
    round_linear,
)
from qig_serve.offline.streams import Streams
from qig_serve.packing import minmax_params, pack_linear, quantize, scale_dtype


def rounding_options(recipe: QuantRecipe) -> RoundingOptions:
    """The recipe's rounding fields."""
    return RoundingOptions(
        range_search=recipe.range_search,
        compensation=recipe.compensation,
        act_order=recipe.act_order,
        damp=recipe.damp,
        damp_by=recipe.damp_by,
        scale_refit=recipe.scale_refit,
        polish_sweeps=recipe.polish_sweeps,
        effort=recipe.effort,
    )


@torch.no_grad()
def round_block(
    block: nn.Module,
    original: nn.Module,
    groups: Sequence[SmoothingGroup],
    results: Sequence[GroupResult],
    streams: Streams,
    where: str,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """Quantizes every linear of `groups`; the block's weights become the dequantized ones.

    The linears of a group share one input, and the groups stand in the order of execution: so a
    linear's statistics see what the linears before it, in this block too, have already lost.
    `original` is the block before equalization; its inputs, divided by a group's columns, are what
    the equalized linear would see in full precision. `results` are those of `equalize_group`, or
    empty where nothing was searched: then real tokens count alike.

    Returns the packed tensors and the rounding report, a linear each.
    """
    recipe, scheme = streams.recipe, streams.scheme
    options = rounding_options(recipe)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    reports: dict[str, dict[str, Any]] = {}
    linears = [block.get_submodule(name) for group in groups for name in group.linears]
    for i, group in enumerate(groups):
        stats = None
        if recipe.needs_statistics:
            result = results[i] if results else None
            name = group.linears[0]
            stats = _statistics(block, original, name, linears, result, streams, where)
        for name in group.linears:
            linear = block.get_submodule(name)
            check_finite(linear.weight, f"{where}, {name}, weight")
            if stats is None:
                rounded = _nearest(linear.weight, streams)
            else:
                rounded = round_linear(
                    linear.weight, stats, scheme, streams.dtype, options, f"{where}, {name}"
                )
                reports[name] = rounded.report
            linear.weight.copy_(rounded.dequantized())
            packed = pack_linear(rounded.codes, rounded.scale, rounded.zero, scheme, streams.dtype)
            tensors[name] = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
    return tensors, reports


def _nearest(weight: torch.Tensor, streams: Streams) -> RoundedLinear:
    scheme = streams.scheme
    scale, zero = minmax_params(weight, scheme, scale_dtype(scheme, streams.dtype))
    return RoundedLinear(quantize(weight, scale, zero, scheme), scale, zero, {})


def _statistics(
    block: nn.Module,
    original: nn.Module,
    name: str,
    linears: Sequence[nn.Module],
    result: GroupResult | None,
    streams: Streams,
    where: str,
) -> LinearStats:
    """Second moments of a linear's input, over the real tokens of all batches."""
    columns = None if result is None else result.columns
    linear, reference = block.get_submodule(name), original.get_submodule(name)
    cross = streams.recipe.compensation in ("gptaq", "qronos")
    accumulator = StatsAccumulator(linear.in_features, cross, streams.device)
    for b in range(len(streams)):
        with quantized_activations(linears, streams.quantizes_activations):
            hidden = streams.quantized.get(b, streams.device)
            x_q = catch_call(block, linear, hidden, streams.kwargs(b)).hidden
        check_finite(x_q, f"{where}, {name}, input")
        mask = streams.mask(b)
        x_fp = None
        if cross:
            hidden = streams.fp.get(b, streams.device)
            x_fp = catch_call(original, reference, hidden, streams.kwargs(b)).hidden
            x_fp = (x_fp / columns if columns is not None else x_fp)[mask]
        weights = mask.float() if result is None else result.token_weights[b]
        accumulator.accumulate(x_q[mask], x_fp, weights[mask])
    return accumulator.finish()
