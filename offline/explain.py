"""Token weights of one sample at chosen layers, without quantizing: `qig-serve attribute`.

Every decoder layer is taken as the search would first meet it: full-precision input, weights
rounded to nearest. For weight-only schemes the path starts at zero; with quantized activations
at the input that the rounded layers before give (attribution.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve.errors import UserError
from qig_serve.family_row import SmoothingGroup
from qig_serve.formats import QuantScheme, get_scheme
from qig_serve.model_directory import context_length, find_model
from qig_serve.offline.calibration.batches import CalibrationBatch, make_batches
from qig_serve.offline.importance.attribution import (
    Quadrature,
    attribute,
    clip_outliers,
    completeness,
    normalize,
    quadrature,
)
from qig_serve.offline.passes.capture import (
    catch_call,
    first_output,
    quantized_activations,
)
from qig_serve.offline.passes.parts import inner_names
from qig_serve.offline.placement import pick_device
from qig_serve.offline.report.pictures import TokenPicture, token_picture
from qig_serve.offline.source import loaded_model
from qig_serve.packing import fake_quantize, fake_quantize_activation, scale_dtype
from qig_serve.samples import ImageSource, Sample, load_image

_MAX_LENGTH = 1 << 16


@dataclass(frozen=True)
class LayerWeights:
    """Token weights of one sample at one layer, a mean over the layer's searched modules."""

    weights: torch.Tensor
    """lambda, [T], sums to 1; zero on template tokens."""
    completeness: float
    """Largest relative error of the integral among the modules."""


def explain_sample(
    model: Path | str,
    images: Sequence[ImageSource],
    prompt: str,
    answer: str | None,
    choose_layers: Callable[[int], Sequence[int]],
    scheme: str = "w3a16",
    steps: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[TokenPicture, dict[str, float]]:
    """The picture of a sample, and the completeness error of each layer in it.

    `model` is its directory, or its org/name where the hub's local cache has it. `choose_layers`
    maps the number of decoder layers to those wanted. UserError for a model or a picture that
    cannot be read, and for an unknown scheme.
    """
    try:
        quant_scheme = get_scheme(scheme)
    except ValueError as error:
        raise UserError(str(error)) from None
    pictures = [load_image(path) for path in images]
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in pictures]
    content.append({"type": "text", "text": prompt})
    sample = Sample("picture", "picture", ({"role": "user", "content": content},), answer)

    loaded = loaded_model.load(find_model(model), device=pick_device("auto"))
    chosen = choose_layers(loaded.num_blocks)
    (batch,) = make_batches(
        [sample],
        loaded.processor,
        loaded.image_token_id,
        max_length=sys.maxsize,
        context=context_length(loaded.text_config),
        called="the prompt",
    )
    if (length := batch.token_mask.shape[1]) > _MAX_LENGTH:
        raise UserError(
            f"the prompt is {length} tokens long, more than {_MAX_LENGTH}: shorten it, or shrink "
            "its images"
        )
    answered = batch.answer_mask[0].nonzero()
    names = ", ".join(i.name if isinstance(i, Path) else "a picture" for i in images)
    # Before the layers are run: tokens that cannot be mapped must not cost the time of all others.
    picture = token_picture(
        f"{names}: {prompt}",
        loaded.config,
        loaded.processor,
        batch.inputs,
        pictures,
        batch.token_mask[0],
        int(answered[0]) if len(answered) else batch.token_mask.shape[1],
        {},
    )
    rule = quadrature("gauss", steps)
    found = explain_layers(loaded, batch, chosen, quant_scheme, rule, progress)
    weights = {f"layer {index}": layer.weights.float() for index, layer in found.items()}
    errors = {f"layer {index}": layer.completeness for index, layer in found.items()}
    return replace(picture, weights=weights), errors


@torch.no_grad()
def explain_layers(
    loaded: loaded_model.LoadedModel,
    batch: CalibrationBatch,
    chosen: Sequence[int],
    scheme: QuantScheme,
    rule: Quadrature,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[int, LayerWeights]:
    """Layer -> its token weights, for a batch of one sample; one block in memory at a time."""
    before = loaded.block_inputs(batch.inputs)
    mask = batch.token_mask.to(before.hidden.device)
    full = rounded = before.hidden
    before_rounded = before.apart()
    found: dict[int, LayerWeights] = {}
    last = max(chosen)
    for index in range(last + 1):
        if progress is not None:
            progress("attributing", index, last + 1)
        block, kwargs = loaded.block(index), before.kwargs(index)
        if index in chosen:
            start = rounded if scheme.activation_bits is not None else None
            groups = [group for group in loaded.groups(block) if group.expert is None]
            found[index] = _explain(
                block, groups, full, start, kwargs, mask, scheme, loaded.dtype, rule
            )
        full = first_output(block(full, **kwargs))
        if scheme.activation_bits is not None:
            linears = loaded.linears(block)
            kwargs = before_rounded.kwargs(index)
            rounded = _through_rounded(block, linears, rounded, kwargs, scheme, loaded.dtype)
    if progress is not None:
        progress("attributing", last + 1, last + 1)
    return found


def _through_rounded(
    block: nn.Module,
    linears: Sequence[nn.Module],
    hidden: torch.Tensor,
    kwargs: Mapping[str, Any],
    scheme: QuantScheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The block's output with its linears rounded to nearest, for good, on int8 inputs."""
    for linear in linears:
        linear.weight.copy_(fake_quantize(linear.weight, scheme, scale_dtype(scheme, dtype)))
    with quantized_activations(linears):
        return first_output(block(hidden, **kwargs))


def _explain(
    block: nn.Module,
    groups: Sequence[SmoothingGroup],
    hidden: torch.Tensor,
    start: torch.Tensor | None,
    kwargs: Mapping[str, Any],
    mask: torch.Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype,
    rule: Quadrature,
) -> LayerWeights:
    """`start` is the block's input in the rounded model, None for paths that start at zero."""
    total, worst = torch.zeros(mask.shape, device=mask.device), 0.0
    for group in groups:
        module, x0 = block.get_submodule(group.loss_module), None
        call = catch_call(block, module, hidden, kwargs)
        if start is not None:
            x0 = fake_quantize_activation(catch_call(block, module, start, kwargs).hidden)
        names, readers = inner_names(group), inner_names(group, group.readers)
        result = attribute(module, names, call, x0, mask, scheme, dtype, rule, readers)
        weights, _ = normalize(clip_outliers(result.importance, mask), mask)
        total += weights
        error = completeness(float(result.integral.sum()), float(result.difference.sum()))
        worst = max(worst, error)
    return LayerWeights(total[0].cpu() / len(groups), worst)
