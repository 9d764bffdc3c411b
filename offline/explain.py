"""Token weights of one sample at chosen layers, without quantizing: `qig-serve attribute`.

Every decoder layer is taken as the search would first meet it: full-precision input, weights
rounded to nearest. Only weight-only schemes start the path at zero; with quantized activations it
starts at the input that the rounded layers before give (attribution.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qig_serve.formats import QuantScheme
from qig_serve.offline.attribution import (
    Quadrature,
    clip_outliers,
    completeness,
    integrate,
    normalize,
)
from qig_serve.offline.capture import catch_call, quantized_activations, run_module
from qig_serve.offline.search import all_linears, quantized_weights
from qig_serve.packing import fake_quantize, fake_quantize_activation, scale_dtype

if TYPE_CHECKING:
    from qig_serve.offline.architectures import SmoothingGroup


@dataclass(frozen=True)
class LayerWeights:
    """Token weights of one sample at one layer, a mean over the layer's searched modules."""

    weights: torch.Tensor
    """lambda, [T], sums to 1; zero on template tokens."""
    completeness: float
    """Largest relative error of the integral among the modules."""


@dataclass(frozen=True)
class _LayerInput:
    hidden: torch.Tensor
    kwargs: Mapping[str, Any]


def explain_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    groups: Sequence[SmoothingGroup],
    inputs: Mapping[str, torch.Tensor],
    token_mask: torch.Tensor,
    chosen: Sequence[int],
    scheme: QuantScheme,
    rule: Quadrature,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[int, LayerWeights]:
    """Layer -> its token weights, for a batch of one sample; `token_mask` [1, T].

    `layers` are the decoder's blocks and `groups` what is searched in each of them.
    """
    full = _layer_inputs(model, layers, inputs, chosen)
    quantized = full
    if scheme.activation_bits is not None:
        with _rounded(layers, scheme):
            quantized = _layer_inputs(model, layers, inputs, chosen)
    found = {}
    for done, index in enumerate(chosen):
        progress(done, len(chosen))
        start = quantized[index] if scheme.activation_bits is not None else None
        found[index] = _explain(layers[index], groups, full[index], start, token_mask, scheme, rule)
    progress(len(chosen), len(chosen))
    return found


@torch.no_grad()
def _layer_inputs(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Mapping[str, torch.Tensor],
    chosen: Sequence[int],
) -> dict[int, _LayerInput]:
    """What the chosen layers are called with in one forward pass."""
    found: dict[int, _LayerInput] = {}

    def make_hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            found[index] = _LayerInput(hidden.detach(), rest)

        return hook

    handles = [layers[i].register_forward_pre_hook(make_hook(i), with_kwargs=True) for i in chosen]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _rounded(layers: Sequence[nn.Module], scheme: QuantScheme) -> Iterator[None]:
    """Inside, every linear of the layers is rounded to nearest, and its inputs are int8."""
    linears = [linear for layer in layers for linear in all_linears(layer)]
    before = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, before, strict=True):
            rounded = fake_quantize(weight, scheme, scale_dtype(scheme, weight.dtype))
            linear.weight.data = rounded.to(weight.dtype)
        with quantized_activations(linears):
            yield
    finally:
        for linear, weight in zip(linears, before, strict=True):
            linear.weight.data = weight


def _explain(
    layer: nn.Module,
    groups: Sequence[SmoothingGroup],
    full: _LayerInput,
    start: _LayerInput | None,
    token_mask: torch.Tensor,
    scheme: QuantScheme,
    rule: Quadrature,
) -> LayerWeights:
    total, worst, searched = torch.zeros_like(token_mask, dtype=torch.float32), 0.0, 0
    for group in groups:
        module = layer.get_submodule(group.loss_module)
        linears = [n.removeprefix(group.loss_module).removeprefix(".") for n in group.linears]
        with torch.no_grad():
            call = catch_call(layer, module, full.hidden, full.kwargs)
            x = call.hidden.float()
            x0 = torch.zeros_like(x)
            if start is not None:
                other = catch_call(layer, module, start.hidden, start.kwargs).hidden
                x0 = fake_quantize_activation(other.float())
        dtype = module.get_submodule(linears[0]).weight.dtype
        weights = quantized_weights(module, linears, None, scheme, dtype)
        inner = all_linears(module)

        def branch(
            z: torch.Tensor,
            replaced: Mapping[str, torch.Tensor] | None,
            module: nn.Module = module,
            call: Any = call,
            inner: Sequence[nn.Module] = inner,
        ) -> torch.Tensor:
            quantizes = replaced is not None and scheme.activation_bits is not None
            with quantized_activations(inner, quantizes):
                return run_module(module, call.with_input(z), replaced)

        result = integrate(
            lambda z, f=branch: f(z, None),  # type: ignore[misc]
            lambda z, f=branch, w=weights: f(z, w),  # type: ignore[misc]
            x,
            x0,
            token_mask,
            rule,
        )
        weighed, _ = normalize(clip_outliers(result.importance, token_mask), token_mask)
        total += weighed
        error = completeness(float(result.integral.sum()), float(result.difference.sum()))
        worst, searched = max(worst, error), searched + 1
    return LayerWeights((total / max(1, searched))[0], worst)
