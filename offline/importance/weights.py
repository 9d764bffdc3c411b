"""Token weights of one group: where importance comes from, clipping, normalization, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup
from qig_serve.offline.calibration.batches import MODALITIES
from qig_serve.offline.importance.attention import attention_importance
from qig_serve.offline.importance.attribution import (
    Attribution,
    attribute,
    branches,
    clip_outliers,
    completeness,
    discrepancy,
    normalize,
    quadrature,
)
from qig_serve.offline.importance.gradients import (
    AnswerGradients,
    modality_importance,
    modality_means,
)
from qig_serve.offline.passes.capture import catch_call
from qig_serve.offline.passes.parts import ModuleParts, inner_names
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import TokenWeighting
from qig_serve.offline.results import COMPLETENESS_LIMIT, TokenShare
from qig_serve.packing import fake_quantize_activation


@dataclass(frozen=True)
class GroupTokens:
    """A group of block `index` whose tokens are to be weighed."""

    block: nn.Module
    group: SmoothingGroup
    index: int
    streams: Streams
    captured: ModuleParts
    weighting: TokenWeighting
    gradients: AnswerGradients | None
    """For the sources modality and gradient."""

    @property
    def masks(self) -> list[torch.Tensor]:
        """Real tokens of each batch, bool [B, T]."""
        return [self.streams.mask(b) for b in range(len(self.streams))]

    @property
    def magnitude(self) -> dict[int, torch.Tensor]:
        """Gradient magnitudes at the group's loss module, by batch."""
        if self.gradients is None:
            return {}
        return self.gradients.of(self.index, self.group.loss_module)


@dataclass
class WeighedTokens:
    """Token weights of a group, and what the report says about them."""

    weights: list[torch.Tensor]
    """lambda of each batch, [B, T]."""
    shares: dict[str, TokenShare]
    completeness: float | None = None
    fallbacks: list[str] = field(default_factory=list)


Importance = tuple[list[torch.Tensor], float | None]
"""Importance of each batch's tokens [B, T], and the error of completeness if there is one."""


def _uniform(tokens: GroupTokens) -> Importance:
    return [mask.float() for mask in tokens.masks], None


def _modality(tokens: GroupTokens) -> Importance:
    streams = tokens.streams
    means = modality_means(tokens.magnitude, streams.batches, streams.ranks)
    masks = enumerate(tokens.masks)
    return [modality_importance(means, streams.modality(b), mask) for b, mask in masks], None


def _gradient(tokens: GroupTokens) -> Importance:
    magnitude = tokens.magnitude
    zero = torch.zeros(())  # of batches without an answer
    masks = enumerate(tokens.masks)
    return [magnitude.get(b, zero).to(mask.device) * mask for b, mask in masks], None


def _attention(tokens: GroupTokens) -> Importance:
    """Attention received in this block, whatever the group; alike for all where none is paid."""
    block, streams = tokens.block, tokens.streams
    attention = next((m for m in block.children() if hasattr(m, "head_dim")), None)
    if attention is None:  # gated delta-net, convolution
        return _uniform(tokens)
    found = []
    for b, mask in enumerate(tokens.masks):
        call = catch_call(block, attention, streams.fp.get(b, streams.device), streams.kwargs(b))
        found.append(attention_importance(attention, call, mask))
    return found, None


def _perturbation(tokens: GroupTokens) -> Importance:
    """The discrepancy at the input itself, without gradients."""
    streams, captured = tokens.streams, tokens.captured
    module = tokens.block.get_submodule(tokens.group.loss_module)
    parts = []
    for i, (call, mask) in enumerate(zip(captured.calls, captured.masks, strict=True)):
        x = captured.inputs.get(i, streams.device)
        full, quantized = branches(
            module,
            inner_names(tokens.group),
            call,
            streams.scheme,
            streams.dtype,
            inner_names(tokens.group, tokens.group.readers),
        )
        parts.append(discrepancy(full(x), quantized(x)) * mask)
    return captured.to_batches(parts, tokens.masks), None


_FINER = 6
"""Gauss nodes where fewer miss completeness: it held with these on trained models."""


def _qig(tokens: GroupTokens) -> Importance:
    found = _integrated(tokens)
    weighting, scheme = tokens.weighting, tokens.streams.scheme
    refines = weighting.quadrature == "gauss" and weighting.steps < _FINER
    # With quantized activations inside, more nodes do not come nearer: the gradient passes straight
    # through their rounding.
    if refines and scheme.activation_bits is None and found[1] > COMPLETENESS_LIMIT:
        found = _integrated(replace(tokens, weighting=replace(weighting, steps=_FINER)))
    return found


def _integrated(tokens: GroupTokens) -> tuple[list[torch.Tensor], float]:
    """QIG's importance of each batch's tokens [B, T], and the error of completeness."""
    parts = [attribute_part(tokens, i) for i in range(len(tokens.captured.calls))]
    integral, difference = tokens.streams.ranks.total(
        sum(float(a.integral.double().sum()) for a in parts),
        sum(float(a.difference.double().sum()) for a in parts),
    )
    importance = tokens.captured.to_batches([a.importance for a in parts], tokens.masks)
    return importance, completeness(integral, difference)


def attribute_part(tokens: GroupTokens, part: int) -> Attribution:
    """Integrated gradients of one part's tokens."""
    streams, captured, weighting = tokens.streams, tokens.captured, tokens.weighting
    x0 = None
    if weighting.baseline == "quantized" and captured.quantized_inputs is not None:
        # Of the quantized prefix, and int8 as the linears see it: differs from X in the first
        # block too, where the two prefixes are the same.
        x0 = fake_quantize_activation(captured.quantized_inputs.get(part, streams.device))
    return attribute(
        tokens.block.get_submodule(tokens.group.loss_module),
        inner_names(tokens.group),
        captured.calls[part].with_input(captured.inputs.get(part, streams.device)),
        x0,
        captured.masks[part],
        streams.scheme,
        streams.dtype,
        quadrature(weighting.quadrature, weighting.steps),
        inner_names(tokens.group, tokens.group.readers),
    )


SOURCES: dict[str, tuple[Callable[[GroupTokens], Importance], bool]] = {
    "uniform": (_uniform, False),
    "modality": (_modality, False),
    "gradient": (_gradient, True),
    "attention": (_attention, True),
    "perturbation": (_perturbation, True),
    "qig": (_qig, True),
}
"""Source of token weights -> its importance, and whether outliers are clipped (`iqr`)."""


@torch.no_grad()
def weigh_tokens(tokens: GroupTokens) -> WeighedTokens:
    """The token weights of every batch for a group."""
    source = tokens.weighting.source
    importance_of, clips = SOURCES[source]
    raw, error = importance_of(tokens)
    weights, outliers, empty = [], [], 0
    for importance, mask in zip(raw, tokens.masks, strict=True):
        clipped = importance
        if clips and tokens.weighting.iqr:
            clipped = clip_outliers(importance, mask)
        normalized, without = normalize(clipped, mask)
        weights.append(normalized)
        outliers.append(clipped != importance)
        empty += without
    (without_any,) = tokens.streams.ranks.total(empty)
    shares = _token_shares(tokens.streams, raw, weights, outliers)
    result = WeighedTokens(weights, shares, error)
    if without_any:
        result.fallbacks.append(
            f"layer {tokens.index}, {tokens.group.name}: {without_any:.0f} samples without "
            f"{source} importance got uniform token weights"
        )
    return result


def _token_shares(
    streams: Streams,
    raw: list[torch.Tensor],
    weights: list[torch.Tensor],
    outliers: list[torch.Tensor],
) -> dict[str, TokenShare]:
    """Share of importance and of token weight by modality, over the samples of all processes."""
    shares = {}
    before, _ = zip(*(normalize(u, streams.mask(b)) for b, u in enumerate(raw)), strict=True)
    for name, code in MODALITIES.items():
        chosen = [streams.mask(b) & (streams.modality(b) == code) for b in range(len(streams))]
        samples, tokens, first, last, clipped = streams.ranks.total(
            sum(len(u) for u in raw),
            sum(int(m.sum()) for m in chosen),
            sum(float(u[m].sum()) for u, m in zip(before, chosen, strict=True)),
            sum(float(u[m].sum()) for u, m in zip(weights, chosen, strict=True)),
            sum(int(u[m].sum()) for u, m in zip(outliers, chosen, strict=True)),
        )
        shares[name] = TokenShare(
            tokens=int(tokens),
            before_clip=first / samples,
            after_clip=last / samples,
            clipped=int(clipped),
        )
    return shares
