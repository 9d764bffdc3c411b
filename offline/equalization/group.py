"""One smoothing group of one block: capture -> token weights -> search of scales -> fold."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup
from qig_serve.offline.equalization.channel_scales import Noise, token_moments
from qig_serve.offline.equalization.search import Candidate, SearchBatch, best, evaluate_candidates
from qig_serve.offline.equalization.smoothing import (
    SMOOTH_ALPHA,
    fold,
    group_scales,
    output_of_channel,
    power_scales,
    previous_outputs,
    smoothquant_scales,
)
from qig_serve.offline.importance.gradients import AnswerGradients
from qig_serve.offline.importance.weights import GroupTokens, weigh_tokens
from qig_serve.offline.passes.parts import ModuleParts, capture_parts, inner_names
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Equalization
from qig_serve.offline.results import GroupResult, ModuleReport


@dataclass(frozen=True)
class Found:
    """What a search has chosen."""

    candidate: Candidate
    losses: list[float]
    """Of all candidates, in the order in which they were tried; round to nearest first."""
    loss: float
    channel_seconds: float = 0.0


@torch.no_grad()
def equalize_group(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    settings: Equalization,
    gradients: AnswerGradients | None,
    index: int,
) -> GroupResult:
    """Finds the scales of a group of block `index` and folds them, in place.

    The target is f(X, W) on the full-precision stream, and the quantized branch reads the same X.
    `gradients` is needed for the token weights modality and gradient.
    """
    where = f"layer {index}, {group.name}"
    started = time.monotonic()
    weighting = settings.weighting
    captured = capture_parts(block, group, streams, weighting.needs_quantized_input, where)
    after_capture = time.monotonic()
    tokens = weigh_tokens(GroupTokens(block, group, index, streams, captured, weighting, gradients))
    after_weights = time.monotonic()
    masks = [streams.mask(b) for b in range(len(streams))]
    weights = captured.to_parts(tokens.weights, masks)
    found = search_scales(block, group, streams, settings, captured, weights, where)
    captured.clear()
    report = ModuleReport(
        name=group.name,
        linears=list(group.linears),
        loss_module=group.loss_module,
        exponent=found.candidate.exponent,
        loss=found.loss,
        loss_rtn=found.losses[0],
        losses=found.losses,
        completeness=tokens.completeness,
        token_shares=tokens.shares,
        seconds={
            "capture": after_capture - started,
            "token_weights": after_weights - after_capture,
            "search": time.monotonic() - after_weights - found.channel_seconds,
            "channels": found.channel_seconds,
        },
    )
    result = GroupResult(report, tokens.weights, fallbacks=tokens.fallbacks)
    if settings.kind != "none":
        result.columns = found.candidate.columns
        result.changed = fold(block, group, found.candidate.scales, streams.dtype)
    return result


def search_scales(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    settings: Equalization,
    captured: ModuleParts,
    weights: Sequence[torch.Tensor],
    where: str,
) -> Found:
    """Tries the candidates; `weights` are those of the parts' tokens."""

    def batches() -> Iterator[SearchBatch]:
        for i, call in enumerate(captured.calls):
            x = captured.inputs.get(i, streams.device)
            target = captured.targets.get(i, streams.device)
            yield SearchBatch(call.with_input(x), target, weights[i])

    def evaluate(tried: Sequence[Candidate]) -> list[float]:
        return evaluate_candidates(
            block.get_submodule(group.loss_module),
            inner_names(group),
            tried,
            batches,
            streams.scheme,
            streams.dtype,
            where,
            streams.ranks,
            inner_names(group, group.readers),
        )

    candidates = _candidates(block, group, streams, settings, captured)
    seconds = 0.0
    if settings.kind == "channels" and group.kind != "none":
        began = time.monotonic()
        moved = _least_noise(block, group, streams, settings, candidates, captured, weights)
        seconds = time.monotonic() - began
        candidates = [candidates[0], moved]
    losses = evaluate(candidates)
    chosen = best(losses) if settings.kind == "search" else -1
    return Found(candidates[chosen], losses, losses[chosen], seconds)


def _candidates(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    settings: Equalization,
    captured: ModuleParts,
) -> list[Candidate]:
    """Round to nearest first (all scales 1), then what the settings ask for."""
    act_mean = previous_outputs(block, group, captured.act_mean)

    def candidate(exponent: float, scales: torch.Tensor) -> Candidate:
        columns = group_scales(block, group, scales, streams.dtype)
        return Candidate(exponent, scales, columns)

    candidates = [candidate(0.0, torch.ones_like(act_mean))]
    if group.kind == "none":
        return candidates
    if settings.kind in ("search", "channels"):
        for step in range(1, settings.grid):
            exponent = step / settings.grid
            candidates.append(candidate(exponent, power_scales(act_mean, exponent)))
    elif settings.kind == "smoothquant":
        weights = [block.get_submodule(name).weight.abs().amax(0) for name in group.linears]
        weight_max = previous_outputs(block, group, torch.stack(weights).amax(0))
        act_max = previous_outputs(block, group, captured.act_max)
        scales = smoothquant_scales(act_max, weight_max)
        candidates.append(candidate(SMOOTH_ALPHA, scales))
    return candidates


def _least_noise(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    settings: Equalization,
    starts: Sequence[Candidate],
    captured: ModuleParts,
    token_weights: Sequence[torch.Tensor],
) -> Candidate:
    """Each channel's scale for itself, from the best of `starts` (channel_scales.py)."""
    # With int8 activations, whose errors nothing makes up for, compensation is left out.
    damping = None if streams.quantizes_activations else settings.compensation
    moments = token_moments(
        (
            (captured.inputs.get(i, streams.device)[mask], token_weights[i][mask])
            for i, mask in enumerate(captured.masks)
        ),
        sum(int(mask.sum()) for mask in captured.masks),
        streams.quantizes_activations,
        compensates=damping is not None,
    )
    weights = [block.get_submodule(name).weight for name in group.linears]
    channel_of = output_of_channel(block, group, len(starts[0].scales))
    noise = Noise(weights, moments, streams.scheme, channel_of, damping, streams.ranks)
    start = starts[noise.quietest([candidate.scales for candidate in starts])]
    scales = noise.minimize(start.scales)
    return Candidate(start.exponent, scales, group_scales(block, group, scales, streams.dtype))
