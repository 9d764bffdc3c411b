"""Token weights of one group: where importance comes from, clipping, normalization, report."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from qig_serve.offline.architectures import SmoothingGroup
from qig_serve.offline.attribution import (
    Attribution,
    clip_outliers,
    completeness,
    discrepancy,
    integrate,
    normalize,
    quadrature,
)
from qig_serve.offline.baselines import (
    MODALITIES,
    AnswerGradients,
    attention_importance,
    modality_importance,
    modality_means,
)
from qig_serve.offline.capture import catch_call, quantized_activations, run_module
from qig_serve.offline.parts import ModuleParts, inner_names
from qig_serve.offline.recipe import TokenWeighting
from qig_serve.offline.report_data import TokenShare
from qig_serve.offline.search import all_linears, quantized_weights
from qig_serve.offline.streams import Streams
from qig_serve.packing import fake_quantize_activation


@dataclass
class TokenWeights:
    """Token weights of a group, and what the report says about them."""

    weights: list[torch.Tensor]
    """lambda of each batch, [B, T]."""
    shares: dict[str, TokenShare]
    completeness: float | None = None
    fallbacks: list[str] = field(default_factory=list)


@torch.no_grad()
def weigh_tokens(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    captured: ModuleParts,
    weighting: TokenWeighting,
    gradients: AnswerGradients | None,
    index: int,
) -> TokenWeights:
    """The token weights of every batch for a group of block `index`.

    `gradients` is needed for the sources modality and gradient.
    """
    source = weighting.source
    masks = [streams.mask(b) for b in range(len(streams))]
    integral, difference = 0.0, 0.0
    magnitude = {} if gradients is None else gradients.of(index, group.loss_module)
    if source == "uniform":
        raw = [mask.float() for mask in masks]
    elif source == "modality":
        means = modality_means(magnitude, streams.batches, streams.ranks)
        raw = [modality_importance(means, streams.modality(b), m) for b, m in enumerate(masks)]
    elif source == "gradient":
        raw = [
            magnitude[b].to(mask.device) * mask
            if b in magnitude
            else torch.zeros_like(mask, dtype=torch.float32)
            for b, mask in enumerate(masks)
        ]
    elif source == "attention":
        raw = [_attention(block, streams, b) for b in range(len(streams))]
    else:
        parts = [
            attribute_part(block, group, streams, captured, weighting, i)
            for i in range(len(captured.calls))
        ]
        raw = captured.to_batches([a.importance for a in parts], masks)
        integral = sum(float(a.integral.double().sum()) for a in parts)
        difference = sum(float(a.difference.double().sum()) for a in parts)
        integral, difference = streams.ranks.total(integral, difference)
    clip = weighting.iqr and source in ("gradient", "attention", "perturbation", "qig")
    weights, outliers, empty = [], [], 0
    for importance, mask in zip(raw, masks, strict=True):
        clipped = clip_outliers(importance, mask) if clip else importance
        normalized, without = normalize(clipped, mask)
        weights.append(normalized)
        outliers.append(clipped != importance)
        empty += without
    (without_any,) = streams.ranks.total(empty)
    result = TokenWeights(weights, _token_shares(streams, raw, weights, outliers))
    if source == "qig":
        result.completeness = completeness(integral, difference)
    if without_any:
        result.fallbacks.append(
            f"layer {index}, {group.name}: {without_any:.0f} samples without {source} importance "
            "got uniform token weights"
        )
    return result


def attribute_part(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    captured: ModuleParts,
    weighting: TokenWeighting,
    part: int,
) -> Attribution:
    """Importance of one part's tokens: integrated gradients, or the discrepancy alone."""
    module = block.get_submodule(group.loss_module)
    call = captured.calls[part]
    weights = quantized_weights(module, inner_names(group), None, streams.scheme, streams.dtype)
    linears = all_linears(module)

    def full(z: torch.Tensor) -> torch.Tensor:
        return run_module(module, call.with_input(z))

    def quantized(z: torch.Tensor) -> torch.Tensor:
        with quantized_activations(linears, streams.quantizes_activations):
            return run_module(module, call.with_input(z), weights)

    x, mask = captured.inputs.get(part, streams.device), captured.masks[part]
    if weighting.source == "perturbation":
        zero = torch.zeros(len(x), device=x.device)
        return Attribution(discrepancy(full(x), quantized(x)) * mask, zero, zero)
    if weighting.baseline == "quantized" and captured.quantized_inputs is not None:
        # Of the quantized prefix, and int8 as the linears see it: differs from X in the first
        # block too, where the two prefixes are the same.
        x0 = fake_quantize_activation(captured.quantized_inputs.get(part, streams.device))
    else:
        x0 = torch.zeros_like(x)
    # The gradient of one linear is the same all along a path from zero: one node is exact.
    exact = isinstance(module, nn.Linear) and weighting.baseline == "zero"
    steps = 1 if exact and not streams.quantizes_activations else weighting.steps
    return integrate(full, quantized, x, x0, mask, quadrature(weighting.quadrature, steps))


def _attention(block: nn.Module, streams: Streams, b: int) -> torch.Tensor:
    """Attention received by each token of a batch in this block, whatever the group."""
    attention = next(m for m in block.children() if hasattr(m, "head_dim"))
    hidden = streams.fp.get(b, streams.device)
    call = catch_call(block, attention, hidden, streams.kwargs(b))
    return attention_importance(attention, call, streams.mask(b))


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
