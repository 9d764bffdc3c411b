"""Linears that take what comes before the RMSNorm or the SiLU before them, as one op each.

    qig::rms_norm_<linear>    x, weight, eps, residual -> out [M, N], x + residual [M, K]
    qig::silu_mul_<linear>    gate_up [M, 2 K] -> out [M, N]

A linear whose kernel follows from the number of tokens cannot be fused in a graph, which serves any
number. Inside an op the number is known: few tokens go from the norm to int8 halves in one kernel,
and on to the GEMM that takes them; of many the norm writes 16 bits for the linear's own op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qig_serve.kernels import quantize_activation
from qig_serve.kernels.library import aligned, define
from qig_serve.kernels.quantize_activation import Halves
from qig_serve.kernels.tiles import Tile

OfHalves = tuple[Tile, Callable[[Halves], torch.Tensor]]
"""The tile of a GEMM, and (halves, x_scale_sum) -> out [M, N]."""


def define_fused(
    name: str,
    arguments: str,
    linear: Callable[..., torch.Tensor],
    of_halves: Callable[..., OfHalves | None],
    fake: Callable[..., torch.Tensor],
) -> None:
    """Register both ops for qig::`name`(Tensor x, `arguments`) -> Tensor.

    linear, fake: its implementations, of x [M, K] and the arguments. of_halves(x, the arguments),
    where x has the shape, dtype and device of linear's but no values of it: the GEMM of halves, or
    None where M tokens take another.
    """

    def rms_norm_linear(
        x: torch.Tensor, norm: torch.Tensor, eps: float, residual: torch.Tensor | None, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, given = aligned(x), None if residual is None else aligned(residual)
        if found := of_halves(x, *rest):
            tile, gemm = found
            halves, words, added = quantize_activation.rms_norm_halves(x, norm, eps, given, tile)
            out = gemm((halves, words))
        else:
            normalized, added = quantize_activation.rms_norm(x, norm, eps, given)
            out = linear(normalized, *rest)
        return out, x.new_empty(0) if residual is None else added

    def silu_mul_linear(gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
        gate_up = aligned(gate_up)
        if found := of_halves(_half(gate_up), *rest):
            tile, gemm = found
            return gemm(quantize_activation.silu_mul_halves(gate_up, tile))
        return linear(quantize_activation.silu_mul(gate_up), *rest)

    def fake_rms_norm_linear(
        x: torch.Tensor, norm: torch.Tensor, eps: float, residual: torch.Tensor | None, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fake(x, *rest), x.new_empty(0) if residual is None else torch.empty_like(x)

    define(
        f"rms_norm_{name}(Tensor x, Tensor norm, float eps, Tensor? residual, {arguments})"
        " -> (Tensor, Tensor)",
        rms_norm_linear,
        fake_rms_norm_linear,
    )
    define(
        f"silu_mul_{name}(Tensor gate_up, {arguments}) -> Tensor",
        silu_mul_linear,
        lambda gate_up, *rest: fake(_half(gate_up), *rest),
    )


def _half(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up[:, : gate_up.shape[1] // 2]
