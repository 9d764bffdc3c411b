"""Token weights from quantization-aware integrated gradients (QIG, arXiv 2603.17809).

f(Z, w) is the module under search in full precision, f(Z, w_q) the same module with quantized
weights, and for w4a8 with quantized activations inside. Then

    E_t(Z) = mean over channels |f(Z, w)_t - f(Z, w_q)_t|        discrepancy of a token
    F(Z)   = sum over real tokens of E_t(Z)
    I      = (X - X0) * integral over a in [0, 1] of dF/dZ at X0 + a (X - X0)
    u_t    = mean over channels |I_t|                            importance of a token
    lambda = clip(u) to the quartile fences, normalized to sum 1

All tensors are fp32. B samples, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from qig_serve.formats import QuantScheme
from qig_serve.offline.passes.capture import (
    ModuleCall,
    all_linears,
    quantized_activations,
    quantized_weights,
    run_module,
)

Branch = Callable[[torch.Tensor], torch.Tensor]
"""A module as a function of its input alone: [B, T, C] -> [B, T, N]."""


@dataclass(frozen=True)
class Quadrature:
    """Nodes in [0, 1] and weights that sum to 1."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def quadrature(rule: Literal["gauss", "uniform"], steps: int) -> Quadrature:
    """Gauss-Legendre nodes, or the paper's equal steps a = k / steps, k = 1 .. steps."""
    if rule == "uniform":
        nodes = np.arange(1, steps + 1) / steps
        weights = np.full(steps, 1 / steps)
    else:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        nodes, weights = (nodes + 1) / 2, weights / 2
    return Quadrature(tuple(nodes.tolist()), tuple(weights.tolist()))


@dataclass(frozen=True)
class Attribution:
    """Result for one batch."""

    importance: torch.Tensor
    """u, [B, T]; zero outside the token mask."""
    integral: torch.Tensor
    """Sum of I over tokens and channels, [B]."""
    difference: torch.Tensor
    """F(X) - F(X0), [B]: what completeness says the integral is."""


def discrepancy(full: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """E_t, [B, T], of two outputs [B, T, N]: mean absolute difference over channels, fp32."""
    return (full.float() - quantized.float()).abs().mean(-1)


def integrate(
    full: Branch,
    quantized: Branch,
    x: torch.Tensor,
    x0: torch.Tensor,
    token_mask: torch.Tensor,
    rule: Quadrature,
) -> Attribution:
    """Integrated gradients of F along the straight path from `x0` to `x` ([B, T, C] each).

    `token_mask` [B, T] is True for real tokens; the others have no discrepancy and no importance.
    The samples of a batch must not influence each other.
    """

    def f(z: torch.Tensor) -> torch.Tensor:
        return (discrepancy(full(z), quantized(z)) * token_mask).sum(-1)  # [B]

    delta = x - x0
    gradient = torch.zeros_like(x)
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        z = (x0 + node * delta).requires_grad_()
        with torch.enable_grad():
            (step,) = torch.autograd.grad(f(z).sum(), z)
        gradient.add_(step, alpha=weight)
    attribution = delta * gradient
    with torch.no_grad():
        difference = f(x) - f(x0)
    return Attribution(
        importance=attribution.abs().mean(-1) * token_mask,
        integral=attribution.sum((1, 2)),
        difference=difference,
    )


def branches(
    module: nn.Module,
    linears: Sequence[str],
    call: ModuleCall,
    scheme: QuantScheme,
    dtype: torch.dtype,
    readers: Sequence[str],
) -> tuple[Branch, Branch]:
    """f(., w) and f(., w_q) of a module that is called like `call`, which is not run.

    `linears` and `readers` (which stay in 16 bits) are names inside the module, `dtype` is the
    model's.
    """
    weights = quantized_weights(module, linears, None, scheme, dtype)
    inner = all_linears(module, readers)

    def full(z: torch.Tensor) -> torch.Tensor:
        return run_module(module, call.with_input(z))

    def quantized(z: torch.Tensor) -> torch.Tensor:
        with quantized_activations(inner, scheme.activation_bits is not None):
            return run_module(module, call.with_input(z), weights)

    return full, quantized


def attribute(
    module: nn.Module,
    linears: Sequence[str],
    call: ModuleCall,
    x0: torch.Tensor | None,
    token_mask: torch.Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype,
    rule: Quadrature,
    readers: Sequence[str] = (),
) -> Attribution:
    """Integrated gradients of a module's tokens, from `x0` [B, T, C] (None: zero) to its input.

    The arguments are those of `branches` and `integrate`.
    """
    if isinstance(module, nn.Linear) and x0 is None and scheme.activation_bits is None:
        # The gradient of one linear is the same all along a path from zero: one node is exact.
        rule = quadrature("gauss", 1)
    start = torch.zeros_like(call.hidden) if x0 is None else x0
    full, quantized = branches(module, linears, call, scheme, dtype, readers)
    return integrate(full, quantized, call.hidden, start, token_mask, rule)


def completeness(integral: float, difference: float) -> float:
    """Relative error of the integral: |sum of I - (F(X) - F(X0))| / |F(X) - F(X0)|."""
    return abs(integral - difference) / max(abs(difference), 1e-30)


def clip_outliers(importance: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Clips each sample's importance to [Q1 - 1.5 IQR, Q3 + 1.5 IQR] of its own real tokens.

    Both arguments are [B, T]; masked tokens have no part in the quartiles and become zero.
    """
    clipped = torch.zeros_like(importance)
    for b, mask in enumerate(token_mask):
        u = importance[b, mask]
        if not u.numel():
            continue
        q1, q3 = torch.quantile(u, torch.tensor([0.25, 0.75], device=u.device)).unbind()
        reach = 1.5 * (q3 - q1)
        clipped[b, mask] = u.clamp(q1 - reach, q3 + reach)
    return clipped


def normalize(importance: torch.Tensor, token_mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Token weights [B, T] that sum to 1 for each sample, and the number of samples without any.

    A sample whose importance is zero everywhere, or not finite, gets uniform weights; the caller
    must report how many there were.
    """
    importance = importance * token_mask
    total = importance.sum(-1, keepdim=True)
    usable = torch.isfinite(total) & (total > 0)
    uniform = token_mask / token_mask.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(usable, importance / total, uniform)
    return weights, int((~usable).sum())
