"""Rounds the linears of one equalized block, in the order in which it runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup, expert_number
from qig_serve.offline.passes.output_gradients import output_moments
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.results import ExpertsReport, GroupResult, LinearReport
from qig_serve.offline.rounding.linear import round_linear
from qig_serve.offline.rounding.rounded import RoundedLinear
from qig_serve.offline.rounding.statistics import BlockStatistics, sharing_input
from qig_serve.packing import pack_linear


@dataclass
class RoundedBlock:
    """What rounding a block has given."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """The packed tensors of each linear, by its name."""
    reports: dict[str, LinearReport] = field(default_factory=dict)
    """How each was rounded; empty where the method looks at weights alone."""
    experts: ExpertsReport | None = None


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
) -> RoundedBlock:
    """Quantizes every linear of `groups`; the block's weights become the dequantized ones.

    The linears of a group share one input, and the groups stand in the order of execution: so a
    linear's statistics see what the linears before it, in this block too, have already lost.
    `original` is the block before equalization; its inputs, divided by a group's columns, are what
    the equalized linear would see in full precision. `results` are those of `equalize_group`, or
    empty where nothing was searched: then all tokens count alike. `seconds` is filled with the
    wall time of gathering "statistics" of inputs and what is known of "outputs".
    """
    linears = {name: block.get_submodule(name) for group in groups for name in group.linears}
    statistics = BlockStatistics(block, original, list(linears.values()), streams, method, where)
    rounded_block = RoundedBlock()
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if streams.output_gradients is not None:
        started = time.monotonic()
        outputs = output_moments(block, [n for n in linears if expert_number(n) is None], streams)
        if seconds is not None:
            seconds["outputs"] = time.monotonic() - started
    inputs = [(i, names) for i, group in enumerate(groups) for names in sharing_input(group)]
    for i, names in inputs:
        stats = None
        if method.statistics:
            started = time.monotonic()
            stats = statistics.of(names[0], results[i] if results else None)
            if seconds is not None:
                spent = time.monotonic() - started
                seconds["statistics"] = seconds.get("statistics", 0.0) + spent
        for k, name in enumerate(names):
            weight = linears[name].weight
            # Each process rounds some of the linears, and all of them get the same codes.
            source, found = (k + (groups[i].expert or 0)) % streams.ranks.size, None
            if streams.ranks.rank == source:
                found = round_linear(
                    weight,
                    stats,
                    streams.scheme,
                    streams.dtype,
                    method,
                    f"{where}, {name}",
                    outputs.get(name),
                )
            outputs.pop(name, None)
            rounded = _broadcast(found, source, streams)
            weight.copy_(rounded.dequantized())
            packed = pack_linear(
                rounded.codes, rounded.scale, rounded.zero, streams.scheme, streams.dtype
            )
            rounded_block.tensors[name] = {s: tensor.cpu() for s, tensor in packed.items()}
            if stats is not None:
                rounded_block.reports[name] = rounded.report
    rounded_block.experts = statistics.experts
    statistics.clear()
    return rounded_block


def _broadcast(found: RoundedLinear | None, source: int, streams: Streams) -> RoundedLinear:
    """What process `source` found, on every process."""
    if streams.ranks.size > 1:
        shared = streams.ranks.broadcast_object(None if found is None else found.to("cpu"), source)
        found = None if shared is None else shared.to(streams.device)
    assert found is not None  # the source process has it
    return found
