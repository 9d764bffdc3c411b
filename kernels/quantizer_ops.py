"""The activation quantizers as torch ops.

    qig::quantize_activation    x [M, K] -> codes int8 [M, K'], scale fp32 [M]
    qig::split_halves           x [M, K] -> halves int8 [M, 2, K'], x_scale_sum int32 [pairs, M, 2]
    qig::rms_norm_quantize, qig::rms_norm_halves    the same of RMSNorm(x (+ residual)), and the sum
    qig::silu_mul_quantize, qig::silu_mul_halves    the same of SiLU(gate) * up
    qig::rms_norm, qig::silu_mul                    those alone, in 16 bits

K' is K in whole groups of 128, with zeros behind K. The sum comes rounded to x's dtype, [M, K];
without a residual it is an empty tensor [0].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qig_serve.kernels import quantize_activation
from qig_serve.kernels.layout import padded_inputs, padded_pairs
from qig_serve.kernels.library import aligned, define
from qig_serve.kernels.quantize_activation import Codes, Halves
from qig_serve.kernels.tiles import Tile


def warm_up_codes(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what makes codes of rows of K, alone and fused, for few tokens and for many."""
    for m in (1, quantize_activation.MANY_TOKENS):
        x, gate_up, weight = _zeros(m, k, dtype, device)
        quantize_activation.quantize(x)
        quantize_activation.silu_mul_quantize(gate_up)
        for residual in (None, x):
            quantize_activation.rms_norm_quantize(x, weight, 1e-6, residual)


def warm_up_halves(
    k: int, dtype: torch.dtype, device: torch.device, tiles: list[Tile]
) -> None:  # fmt: skip
    """Compile what makes halves of rows of K, alone and fused, and what is fused without.

    tiles: of products that take them.
    """
    x, gate_up, weight = _zeros(1, k, dtype, device)
    quantize_activation.silu_mul(gate_up)
    for residual in (None, x):
        quantize_activation.rms_norm(x, weight, 1e-6, residual)
    for tile in tiles:
        quantize_activation.split_halves(x, tile)
        quantize_activation.silu_mul_halves(gate_up, tile)
        for residual in (None, x):
            quantize_activation.rms_norm_halves(x, weight, 1e-6, residual, tile)


def _zeros(
    m: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], gate and up [M, 2 K], the weight of a norm [K]."""
    shapes = ((m, k), (m, 2 * k), (k,))
    x, gate_up, weight = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
    return x, gate_up, weight


def _of_aligned(function: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda x: function(aligned(x))


def _with_sum(norm: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., Any]:
    """`norm` as an op, which may not return what it was given: without a residual, no sum."""

    def op(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        given = None if residual is None else aligned(residual)
        *found, added = norm(aligned(x), weight, eps, given)
        return (*found, added.new_empty(0) if residual is None else added)

    return op


def _fake_codes(x: torch.Tensor, k: int) -> Codes:
    codes = x.new_empty(x.shape[0], padded_inputs(k), dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_halves(x: torch.Tensor, k: int) -> Halves:
    m = x.shape[0]
    return (
        x.new_empty(m, 2, padded_inputs(k), dtype=torch.int8),
        x.new_empty(padded_pairs(k), m, 2, dtype=torch.int32),
    )


def _fake_sum(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(0) if residual is None else torch.empty_like(x)


_NORM = "Tensor x, Tensor weight, float eps, Tensor? residual"
_OPS = (
    (
        "quantize_activation(Tensor x) -> (Tensor, Tensor)",
        _of_aligned(quantize_activation.quantize),
        lambda x: _fake_codes(x, x.shape[1]),
    ),
    (
        f"rms_norm_quantize({_NORM}) -> (Tensor, Tensor, Tensor)",
        _with_sum(quantize_activation.rms_norm_quantize),
        lambda x, weight, eps, residual: (*_fake_codes(x, x.shape[1]), _fake_sum(x, residual)),
    ),
    (
        "silu_mul_quantize(Tensor gate_up) -> (Tensor, Tensor)",
        _of_aligned(quantize_activation.silu_mul_quantize),
        lambda gate_up: _fake_codes(gate_up, gate_up.shape[1] // 2),
    ),
    (
        f"rms_norm({_NORM}) -> (Tensor, Tensor)",
        _with_sum(quantize_activation.rms_norm),
        lambda x, weight, eps, residual: (torch.empty_like(x), _fake_sum(x, residual)),
    ),
    (
        "silu_mul(Tensor gate_up) -> Tensor",
        _of_aligned(quantize_activation.silu_mul),
        lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    ),
    (
        "split_halves(Tensor x) -> (Tensor, Tensor)",
        _of_aligned(quantize_activation.split_halves),
        lambda x: _fake_halves(x, x.shape[1]),
    ),
    (
        f"rms_norm_halves({_NORM}) -> (Tensor, Tensor, Tensor)",
        _with_sum(quantize_activation.rms_norm_halves),
        lambda x, weight, eps, residual: (*_fake_halves(x, x.shape[1]), _fake_sum(x, residual)),
    ),
    (
        "silu_mul_halves(Tensor gate_up) -> (Tensor, Tensor)",
        _of_aligned(quantize_activation.silu_mul_halves),
        lambda gate_up: _fake_halves(gate_up, gate_up.shape[1] // 2),
    ),
)
for _op in _OPS:
    define(*_op)
