"""Rounds the linears of one equalized block, in the order in which it runs them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from qig_serve.architectures import SmoothingGroup
from qig_serve.offline.passes.capture import catch_call, check_finite, quantized_activations
from qig_serve.offline.passes.hessian import LinearStats, StatsAccumulator
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.results import GroupResult, LinearReport
from qig_serve.offline.rounding.linear import round_linear
from qig_serve.offline.rounding.rounded import RoundedLinear
from qig_serve.packing import pack_linear


@torch.no_grad()
def round_block(
    block: nn.Module,
    original: nn.Module,
    groups: Sequence[SmoothingGroup],
    results: Sequence[GroupResult],
    streams: Streams,
    method: Rounding,
    where: str,
    seconds: dict[str, float] | None = None,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, LinearReport]]:
    """Quantizes every linear of `groups`; the block's weights become the dequantized ones.

    The linears of a group share one input, and the groups stand in the order of execution: so a
    linear's statistics see what the linears before it, in this block too, have already lost.
    `original` is the block before equalization; its inputs, divided by a group's columns, are what
    the equalized linear would see in full precision. `results` are those of `equalize_group`, or
    empty where nothing was searched: then real tokens count alike. `seconds` is filled with the
    wall time of gathering statistics.

    Returns the packed tensors and the rounding report of each linear, by its name.
    """
    linears = {name: block.get_submodule(name) for group in groups for name in group.linears}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    reports: dict[str, LinearReport] = {}
    for i, group in enumerate(groups):
        stats = None
        if method.statistics:
            result = results[i] if results else None
            started = time.monotonic()
            stats = _statistics(
                original, block, group.linears[0], linears, result, streams, method, where
            )
            if seconds is not None:
                spent = time.monotonic() - started
                seconds["statistics"] = seconds.get("statistics", 0.0) + spent
        for k, name in enumerate(group.linears):
            weight = linears[name].weight
            # Each process rounds some of the linears, and all of them get the same codes.
            source, found = k % streams.ranks.size, None
            if streams.ranks.rank == source:
                found = round_linear(
                    weight, stats, streams.scheme, streams.dtype, method, f"{where}, {name}"
                )
            rounded = _broadcast(found, source, streams)
            weight.copy_(rounded.dequantized())
            packed = pack_linear(
                rounded.codes, rounded.scale, rounded.zero, streams.scheme, streams.dtype
            )
            tensors[name] = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
            if stats is not None:
                reports[name] = rounded.report
    return tensors, reports


def _broadcast(found: RoundedLinear | None, source: int, streams: Streams) -> RoundedLinear:
    """What process `source` found, on every process."""
    if streams.ranks.size > 1:
        shared = streams.ranks.broadcast_object(None if found is None else found.to("cpu"), source)
        found = None if shared is None else shared.to(streams.device)
    assert found is not None  # the source process has it
    return found


def _statistics(
    original: nn.Module,
    block: nn.Module,
    name: str,
    linears: Mapping[str, nn.Module],
    result: GroupResult | None,
    streams: Streams,
    method: Rounding,
    where: str,
) -> LinearStats:
    """Second moments of the input of linear `name`, over the real tokens of all batches."""
    columns = None if result is None else result.columns
    linear, reference = linears[name], original.get_submodule(name)
    accumulator = StatsAccumulator(linear.in_features, method.shifted, streams.device)
    for b in range(len(streams)):
        with quantized_activations(list(linears.values()), streams.quantizes_activations):
            hidden = streams.quantized.get(b, streams.device)
            x_q = catch_call(block, linear, hidden, streams.kwargs(b)).hidden
        check_finite(x_q, f"{where}, {name}, input")
        mask = streams.mask(b)
        weights = result.token_weights[b] if result and method.weighted else mask.float()
        if not method.shifted:
            accumulator.accumulate(x_q[mask], None, weights[mask])
            continue
        hidden = streams.fp.get(b, streams.device)
        x_fp = catch_call(original, reference, hidden, streams.kwargs(b)).hidden
        x_fp = x_fp / columns if columns is not None else x_fp
        second = streams.batches[b].half.to(mask.device)[:, None]
        for half, part in enumerate((mask & ~second, mask & second)):
            accumulator.accumulate(x_q[part], x_fp[part], weights[part], half)
    return accumulator.finish(streams.ranks)
