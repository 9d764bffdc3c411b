"""Equalization before the last linear of every expert of a block: up -> down, each for itself.

What the experts read is equalized once for all of them, with the router (the group of the norm
before them). Here nothing runs but one linear at a time, on the tokens that its expert sees: all
experts of a block together cost what one dense MLP would that is as wide as a token's experts.

The loss is that at the sparse MLP's output, into which an expert's error enters times its routing
weight p: a token counts lambda p where errors are absolute, lambda p^2 where they are squared (as
in the noise of channel_scales.py), with the lambda of the sparse MLP's own search.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup, any_expert
from qig_serve.offline.equalization.group import Found, search_scales
from qig_serve.offline.equalization.smoothing import fold
from qig_serve.offline.passes.parts import ModuleParts, capture_expert
from qig_serve.offline.passes.routing import RoutedTokens, capture_routed
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Equalization
from qig_serve.offline.results import GroupResult, ModuleReport


@torch.no_grad()
def equalize_experts(
    block: nn.Module,
    groups: Sequence[SmoothingGroup],
    streams: Streams,
    settings: Equalization,
    token_weights: list[torch.Tensor],
    index: int,
) -> list[GroupResult]:
    """Finds the scales of the experts' groups of block `index` and folds them, in place.

    token_weights: lambda of each batch, [B, T], of the search at the sparse MLP.
    """
    results = [GroupResult(None, token_weights) for _ in groups]
    if settings.kind == "none" or not groups:
        return results
    where = f"layer {index}, {groups[0].name}"
    started = time.monotonic()
    routed = capture_routed(block, streams, streams.fp, "experts-x", where)
    seconds = {"capture": time.monotonic() - started, "search": 0.0, "channels": 0.0}
    found: list[Found] = []
    for group, result in zip(groups, results, strict=True):
        started = time.monotonic()
        captured = capture_expert(block, group, routed, streams, where)
        weights = _part_weights(group, routed, captured, streams, settings, token_weights)
        seconds["capture"] += time.monotonic() - started
        started = time.monotonic()
        found.append(search_scales(block, group, streams, settings, captured, weights, where))
        captured.clear()
        result.columns = found[-1].candidate.columns
        result.changed = fold(block, group, found[-1].candidate.scales, streams.dtype)
        seconds["search"] += time.monotonic() - started - found[-1].channel_seconds
        seconds["channels"] += found[-1].channel_seconds
    routed.clear()
    results[0].report = _report(groups, found, routed.report.tokens, seconds)
    results[0].experts = routed.report
    return results


def _part_weights(
    group: SmoothingGroup,
    routed: RoutedTokens,
    captured: ModuleParts,
    streams: Streams,
    settings: Equalization,
    token_weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Weights of the parts' tokens, [1, tokens] each."""
    assert group.expert is not None
    power = 2 if settings.kind == "channels" else 1
    flat = torch.cat(
        [
            routed.token_weights(b, group.expert, weights.flatten(), power)
            for b, weights in enumerate(token_weights)
        ]
    )
    if not len(flat):  # no token in this process
        flat = torch.zeros(1, device=streams.device)
    return [part[None] for part in flat.split([mask.numel() for mask in captured.masks])]


def _report(
    groups: Sequence[SmoothingGroup],
    found: Sequence[Found],
    tokens: Sequence[int],
    seconds: dict[str, float],
) -> ModuleReport:
    """Of all experts in one: means over the experts, by the tokens that they see."""

    def mean(values: Sequence[float]) -> float:
        return sum(n * v for n, v in zip(tokens, values, strict=True)) / max(sum(tokens), 1)

    return ModuleReport(
        name=groups[0].name,
        linears=[name for group in groups for name in group.linears],
        loss_module=any_expert(groups[0].loss_module).partition(".*")[0],
        exponent=mean([f.candidate.exponent for f in found]),
        loss=mean([f.loss for f in found]),
        loss_rtn=mean([f.losses[0] for f in found]),
        losses=[mean(losses) for losses in zip(*(f.losses for f in found), strict=True)],
        seconds=seconds,
    )
