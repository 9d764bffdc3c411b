"""Rounds the linears of one equalized block, in the order in which it runs them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qig_serve.offline.architectures import SmoothingGroup
from qig_serve.offline.capture import (
    ModuleCall,
    catch_call,
    check_finite,
    first_output,
    quantized_activations,
    run_module,
)
from qig_serve.offline.equalize import GroupResult
from qig_serve.offline.learned_rounding import learn_rounding
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.rounding import (
    LinearStats,
    RoundedLinear,
    RoundingOptions,
    StatsAccumulator,
    round_linear,
)
from qig_serve.offline.search import weighted_loss
from qig_serve.offline.streams import Streams
from qig_serve.packing import minmax_params, pack_linear, quantize, scale_dtype


def rounding_options(recipe: QuantRecipe) -> RoundingOptions:
    """The recipe's rounding fields."""
    return RoundingOptions(
        range_search=recipe.range_search,
        range_rounds=recipe.range_rounds,
        compensation=recipe.compensation,
        act_order=recipe.act_order,
        damp=recipe.damp,
        damp_by=recipe.damp_by,
        scale_refit=recipe.scale_refit,
        polish_sweeps=recipe.polish_sweeps,
        validate_shift=recipe.validate_shift,
    )


@torch.no_grad()
def round_block(
    block: nn.Module,
    original: nn.Module,
    groups: Sequence[SmoothingGroup],
    results: Sequence[GroupResult],
    streams: Streams,
    where: str,
    seconds: dict[str, float] | None = None,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    """Quantizes every linear of `groups`; the block's weights become the dequantized ones.

    The linears of a group share one input, and the groups stand in the order of execution: so a
    linear's statistics see what the linears before it, in this block too, have already lost.
    `original` is the block before equalization; its inputs, divided by a group's columns, are what
    the equalized linear would see in full precision. `results` are those of `equalize_group`, or
    empty where nothing was searched: then real tokens count alike. `seconds` is filled with the
    wall time of gathering statistics.

    Returns the packed tensors and the rounding report, a linear each.
    """
    recipe, scheme = streams.recipe, streams.scheme
    options = rounding_options(recipe)
    names = [name for group in groups for name in group.linears]
    linears = {name: block.get_submodule(name) for name in names}
    equalized = {n: m.weight.clone() for n, m in linears.items()} if recipe.effort == "high" else {}
    rounded: dict[str, RoundedLinear] = {}
    for i, group in enumerate(groups):
        stats = None
        if recipe.needs_statistics:
            result = results[i] if results else None
            first = group.linears[0]
            started = time.monotonic()
            stats = _statistics(block, original, first, linears, result, streams, where)
            if seconds is not None:
                spent = time.monotonic() - started
                seconds["statistics"] = seconds.get("statistics", 0.0) + spent
        for k, name in enumerate(group.linears):
            weight = linears[name].weight
            check_finite(weight, f"{where}, {name}, weight")
            if stats is None:
                rounded[name] = _nearest(weight, streams)
            else:
                # Each process rounds some of the linears, and all of them get the same codes.
                source, found = k % streams.ranks.size, None
                if streams.ranks.rank == source:
                    found = round_linear(
                        weight, stats, scheme, streams.dtype, options, f"{where}, {name}"
                    )
                rounded[name] = _share(found, source, streams)
            weight.copy_(rounded[name].dequantized())
    if recipe.effort == "high":
        rounded = _learn(block, original, rounded, equalized, results, streams)
        for name, linear in linears.items():
            linear.weight.copy_(rounded[name].dequantized())
    tensors = {}
    for name, r in rounded.items():
        packed = pack_linear(r.codes, r.scale, r.zero, scheme, streams.dtype)
        tensors[name] = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
    return tensors, {name: r.report for name, r in rounded.items() if r.report}


def _learn(
    block: nn.Module,
    original: nn.Module,
    rounded: Mapping[str, RoundedLinear],
    weights: Mapping[str, torch.Tensor],
    results: Sequence[GroupResult],
    streams: Streams,
) -> dict[str, RoundedLinear]:
    """Learned rounding of all linears, on the token-weighted squared error of the block's output.

    The input is that of the quantized prefix and the target that of full precision, as in the
    statistics. Tokens weigh what they weigh in the groups' searches, on average.
    """
    targets = streams.new_store("learned-y")
    token_weights: list[torch.Tensor] = []
    for b in range(len(streams)):
        hidden = streams.fp.get(b, streams.device)
        targets.put(b, first_output(original(hidden, **streams.kwargs(b))))
        mask = streams.mask(b).float()
        uniform = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        chosen = [r.token_weights[b] for r in results] or [uniform]
        token_weights.append(torch.stack(chosen).mean(0))
    linears = [block.get_submodule(name) for name in rounded]

    def loss(b: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        call = ModuleCall((streams.quantized.get(b, streams.device),), dict(streams.kwargs(b)))
        with quantized_activations(linears, streams.quantizes_activations):
            output = run_module(block, call, {f"{n}.weight": v for n, v in values.items()})
        target = targets.get(b, streams.device)
        return weighted_loss(output, target, token_weights[b], "mse")

    learned = learn_rounding(rounded, weights, streams.scheme, streams.dtype, loss, len(streams))
    targets.clear()
    return learned


def _share(found: RoundedLinear | None, source: int, streams: Streams) -> RoundedLinear:
    """What process `source` found, on every process."""
    if streams.ranks.size > 1:
        shared = streams.ranks.share(None if found is None else found.to("cpu"), source)
        found = None if shared is None else shared.to(streams.device)
    assert found is not None  # the source process has it
    return found


def _nearest(weight: torch.Tensor, streams: Streams) -> RoundedLinear:
    scheme = streams.scheme
    scale, zero = minmax_params(weight, scheme, scale_dtype(scheme, streams.dtype))
    return RoundedLinear(quantize(weight, scale, zero, scheme), scale, zero, {})


def _statistics(
    block: nn.Module,
    original: nn.Module,
    name: str,
    linears: Mapping[str, nn.Module],
    result: GroupResult | None,
    streams: Streams,
    where: str,
) -> LinearStats:
    """Second moments of a linear's input, over the real tokens of all batches."""
    columns = None if result is None else result.columns
    linear, reference = linears[name], original.get_submodule(name)
    cross = streams.recipe.compensation in ("gptaq", "qronos")
    accumulator = StatsAccumulator(
        linear.in_features, cross, streams.device, halves=streams.recipe.validate_shift
    )
    for b in range(len(streams)):
        with quantized_activations(list(linears.values()), streams.quantizes_activations):
            hidden = streams.quantized.get(b, streams.device)
            x_q = catch_call(block, linear, hidden, streams.kwargs(b)).hidden
        check_finite(x_q, f"{where}, {name}, input")
        mask = streams.mask(b)
        x_fp = None
        if cross:
            hidden = streams.fp.get(b, streams.device)
            x_fp = catch_call(original, reference, hidden, streams.kwargs(b)).hidden
            x_fp = x_fp / columns if columns is not None else x_fp
        weighted = result is not None and streams.recipe.weighted_rounding
        weights = result.token_weights[b] if result and weighted else mask.float()
        parts = [mask]
        if streams.recipe.validate_shift:  # the accumulator takes the two halves in turns
            half = streams.batches[b].half.to(mask.device)[:, None]
            parts = [mask & ~half, mask & half]
        for part in parts:
            fp = None if x_fp is None else x_fp[part]
            accumulator.accumulate(x_q[part], fp, weights[part])
    return accumulator.finish(streams.ranks)
