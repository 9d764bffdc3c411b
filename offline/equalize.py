"""One smoothing group of one block: capture -> token weights -> grid search -> fold."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from qig_serve.offline.capture import (
    ModuleCall,
    Store,
    catch_call,
    check_finite,
    quantized_activations,
    run_module,
)
from qig_serve.offline.report_data import ModuleReport, TokenShare
from qig_serve.offline.search import (
    Candidate,
    SearchBatch,
    all_linears,
    best,
    evaluate_candidates,
    quantized_weights,
)
from qig_serve.offline.smoothing import (
    fold,
    group_scales,
    power_scales,
    previous_outputs,
    smoothquant_scales,
)
from qig_serve.offline.streams import Streams
from qig_serve.packing import fake_quantize_activation


@dataclass
class GroupResult:
    """What one group leaves behind for the rest of its block."""

    report: ModuleReport
    token_weights: list[torch.Tensor]
    """lambda of each batch, [B, T]."""
    columns: torch.Tensor | None = None
    """What the linears' columns were multiplied by, [K]; None without equalization."""
    changed: list[str] = field(default_factory=list)
    """16-bit parameters of the block that folding changed."""
    fallbacks: list[str] = field(default_factory=list)


@dataclass
class _Captured:
    """Inputs and targets of a group's loss module."""

    calls: list[ModuleCall]
    """The block's call of the module, a batch, without the input."""
    inputs: Store
    """X: the input in full precision, [B, T, C]."""
    quantized_inputs: Store | None
    """What the quantized prefix gives in its place; None if nothing needs it."""
    targets: Store
    """f(X, W), [B, T, N]."""
    act_mean: torch.Tensor
    """mean |X_c| over real tokens, [C]."""
    act_max: torch.Tensor
    """max |X_c| over real tokens, [C]."""


def inner_names(group: SmoothingGroup) -> list[str]:
    """The group's linears as names inside its loss module ("" if that is the linear itself)."""
    return [n.removeprefix(group.loss_module).removeprefix(".") for n in group.linears]


@torch.no_grad()
def equalize_group(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    gradients: AnswerGradients | None,
    index: int,
) -> GroupResult:
    """Finds the scales of a group of block `index` and folds them, in place.

    The target is f(X, W) on the full-precision stream. The quantized branch reads the same X
    (`search_input` fp, the paper's choice), or what the quantized prefix gives in its place, so
    that the search also weighs what the blocks before have already lost (`quantized`).
    """
    recipe, where = streams.recipe, f"layer {index}, {group.name}"
    report = ModuleReport(
        name=group.name,
        linears=list(group.linears),
        loss_module=group.loss_module,
        exponent=0.0,
        loss=0.0,
        loss_rtn=0.0,
    )
    clock = time.monotonic()
    captured = _capture(block, group, streams, where)
    report.seconds["capture"], clock = time.monotonic() - clock, time.monotonic()
    result = GroupResult(report, [])
    _weigh_tokens(block, group, streams, captured, gradients, index, result)
    report.seconds["token_weights"], clock = time.monotonic() - clock, time.monotonic()

    candidates = _candidates(block, group, streams, captured)
    inputs = captured.inputs
    if recipe.search_input == "quantized" and captured.quantized_inputs is not None:
        inputs = captured.quantized_inputs

    def batches() -> Iterator[SearchBatch]:
        for b, call in enumerate(captured.calls):
            x = inputs.get(b, streams.device)
            target = captured.targets.get(b, streams.device)
            yield SearchBatch(call.with_input(x), target, result.token_weights[b])

    losses = evaluate_candidates(
        block.get_submodule(group.loss_module),
        inner_names(group),
        candidates,
        batches,
        streams.scheme,
        streams.dtype,
        recipe.loss,
        where,
    )
    chosen = best(losses) if recipe.equalize == "search" else len(candidates) - 1
    report.exponent = candidates[chosen].exponent
    report.loss, report.loss_rtn, report.losses = losses[chosen], losses[0], losses
    if recipe.equalize != "none":
        result.columns = candidates[chosen].columns
        result.changed = fold(block, group, candidates[chosen].scales, streams.dtype)
    report.seconds["search"] = time.monotonic() - clock
    for store in (captured.inputs, captured.targets, captured.quantized_inputs):
        if store is not None:
            store.clear()
    return result


def _capture(block: nn.Module, group: SmoothingGroup, streams: Streams, where: str) -> _Captured:
    """Runs the block up to the group's loss module on what the search needs."""
    recipe, module = streams.recipe, block.get_submodule(group.loss_module)
    attributes = recipe.token_weights == "qig" and recipe.baseline == "quantized"
    wants_quantized = attributes or recipe.search_input == "quantized"
    name = group.name.replace("/", "_")
    inputs, targets = streams.new_store(f"{name}-x"), streams.new_store(f"{name}-y")
    quantized = streams.new_store(f"{name}-xq") if wants_quantized else None
    calls: list[ModuleCall] = []
    total, peak, tokens = 0.0, 0.0, 0
    for b in range(len(streams)):
        call = catch_call(block, module, streams.fp.get(b, streams.device), streams.kwargs[b])
        x, mask = call.hidden, streams.mask(b)
        check_finite(x, f"{where}, input")
        target = run_module(module, call)
        check_finite(target, f"{where}, output")
        real = x[mask].float().abs()  # [tokens, C]
        total, tokens = total + real.sum(0), tokens + len(real)
        peak = torch.maximum(torch.as_tensor(peak, device=x.device), real.amax(0))
        inputs.put(b, x)
        targets.put(b, target)
        calls.append(call.without_input())
        if quantized is not None:
            hidden = streams.quantized.get(b, streams.device)
            quantized.put(b, catch_call(block, module, hidden, streams.kwargs[b]).hidden)
    return _Captured(
        calls,
        inputs,
        quantized,
        targets,
        torch.as_tensor(total) / max(tokens, 1),
        torch.as_tensor(peak),
    )


def _candidates(
    block: nn.Module, group: SmoothingGroup, streams: Streams, captured: _Captured
) -> list[Candidate]:
    """Round to nearest first (all scales 1), then what the recipe asks for."""
    recipe = streams.recipe
    act_mean = previous_outputs(block, group, captured.act_mean)

    def candidate(exponent: float, scales: torch.Tensor) -> Candidate:
        columns = group_scales(block, group, scales, streams.dtype)
        return Candidate(exponent, scales, columns)

    candidates = [candidate(0.0, torch.ones_like(act_mean))]
    if recipe.equalize == "search":
        for step in range(1, recipe.grid):
            exponent = step / recipe.grid
            candidates.append(candidate(exponent, power_scales(act_mean, exponent)))
    elif recipe.equalize == "smoothquant":
        weights = [block.get_submodule(name).weight.abs().amax(0) for name in group.linears]
        weight_max = previous_outputs(block, group, torch.stack(weights).amax(0))
        act_max = previous_outputs(block, group, captured.act_max)
        scales = smoothquant_scales(act_max, weight_max, recipe.smooth_alpha)
        candidates.append(candidate(recipe.smooth_alpha, scales))
    return candidates


def _weigh_tokens(
    block: nn.Module,
    group: SmoothingGroup,
    streams: Streams,
    captured: _Captured,
    gradients: AnswerGradients | None,
    index: int,
    result: GroupResult,
) -> None:
    """Fills in the token weights of every batch, and what the report says about them."""
    recipe, report = streams.recipe, result.report
    source = recipe.token_weights
    raw: list[torch.Tensor] = []
    integral, difference = 0.0, 0.0
    magnitude = {} if gradients is None else gradients.of(index, group.loss_module)
    means = modality_means(magnitude, streams.batches) if source == "modality" else {}
    for b in range(len(streams)):
        mask = streams.mask(b)
        if source == "uniform":
            raw.append(mask.float())
        elif source == "modality":
            raw.append(modality_importance(means, streams.modality(b), mask))
        elif source == "gradient":
            values = magnitude.get(b)
            raw.append(torch.zeros_like(mask, dtype=torch.float32) if values is None
                       else values.to(mask.device) * mask)
        elif source == "attention":
            raw.append(_attention(block, group, streams, b))
        else:
            attribution = _attribute(block, group, streams, captured, b)
            raw.append(attribution.importance)
            integral += float(attribution.integral.double().sum())
            difference += float(attribution.difference.double().sum())
    if source == "qig":
        report.completeness = completeness(integral, difference)
    clip = recipe.iqr and source in ("gradient", "attention", "perturbation", "qig")
    empty = 0
    for b, importance in enumerate(raw):
        mask = streams.mask(b)
        clipped = clip_outliers(importance, mask) if clip else importance
        weights, without = normalize(clipped, mask)
        result.token_weights.append(weights)
        empty += without
    if empty:
        result.fallbacks.append(
            f"layer {index}, {group.name}: {empty} samples without {source} importance got "
            "uniform token weights"
        )
    report.token_shares = _token_shares(streams, raw, result.token_weights)


def _attribute(
    block: nn.Module, group: SmoothingGroup, streams: Streams, captured: _Captured, b: int
) -> Attribution:
    """Importance of one batch's tokens: integrated gradients, or the discrepancy alone."""
    recipe, module = streams.recipe, block.get_submodule(group.loss_module)
    call = captured.calls[b]
    weights = quantized_weights(module, inner_names(group), None, streams.scheme, streams.dtype)
    linears = all_linears(module)

    def full(z: torch.Tensor) -> torch.Tensor:
        return run_module(module, call.with_input(z))

    def quantized(z: torch.Tensor) -> torch.Tensor:
        with quantized_activations(linears, streams.quantizes_activations):
            return run_module(module, call.with_input(z), weights)

    x, mask = captured.inputs.get(b, streams.device), streams.mask(b)
    if recipe.token_weights == "perturbation":
        zero = torch.zeros(len(x), device=x.device)
        return Attribution(discrepancy(full(x), quantized(x)) * mask, zero, zero)
    if recipe.baseline == "quantized" and captured.quantized_inputs is not None:
        # Of the quantized prefix, and int8 as the linears see it: differs from X in the first
        # block too, where the two prefixes are the same.
        x0 = fake_quantize_activation(captured.quantized_inputs.get(b, streams.device))
    else:
        x0 = torch.zeros_like(x)
    return integrate(full, quantized, x, x0, mask, quadrature(recipe.quadrature, recipe.steps))


def _attention(block: nn.Module, group: SmoothingGroup, streams: Streams, b: int) -> torch.Tensor:
    """Attention received by each token of a batch in this block, whatever the group."""
    attention = next(m for m in block.children() if hasattr(m, "head_dim"))
    hidden = streams.fp.get(b, streams.device)
    call = catch_call(block, attention, hidden, streams.kwargs[b])
    return attention_importance(attention, call, streams.mask(b))


def _token_shares(
    streams: Streams, raw: list[torch.Tensor], weights: list[torch.Tensor]
) -> dict[str, TokenShare]:
    """Share of importance and of token weight by modality, over all samples."""
    shares = {}
    before, _ = zip(*(normalize(u, streams.mask(b)) for b, u in enumerate(raw)), strict=True)
    samples = sum(len(u) for u in raw)
    for name, code in MODALITIES.items():
        chosen = [streams.mask(b) & (streams.modality(b) == code) for b in range(len(streams))]
        shares[name] = TokenShare(
            tokens=sum(int(m.sum()) for m in chosen),
            before_clip=sum(float(u[m].sum()) for u, m in zip(before, chosen, strict=True))
            / samples,
            after_clip=sum(float(u[m].sum()) for u, m in zip(weights, chosen, strict=True))
            / samples,
        )
    return shares
