"""The vocabulary's tables on a CPU: int8 rows, which a tied model holds once for both uses.

    rows   int8 [N, K]
    power  bf16 [N], rest fp32 [N]: the scale is their product, power a power of two and exact

bf16: torch's GEMM on int8 weights, at twice the speed of one in bf16 (a token: 1.6), which takes
scales of x's dtype; so it is given `power`, and `rest` follows in fp32. Many rows of x, and other
dtypes: a few codes at a time widened, to bf16 where the processor multiplies it, else to fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from qig_serve.kernels.library import Prepared, define

MANY_ROWS = 64
_SCRATCH = 1 << 20  # weights widened at a time


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products in bf16."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


look_up = multiplies_bf16


def describe(n: int, dtype: torch.dtype) -> str:
    """What runs a table of n rows, in words."""
    if dtype != torch.bfloat16:
        return "torch GEMM on dequantized rows"
    return "torch int8 weight-only GEMM; torch GEMM on widened rows for many rows"


def prepare(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> Prepared:
    """codes int8 [N, K] and scale [N, 1] as above."""
    mantissa, exponent = torch.frexp(scale.float().reshape(-1))
    power = torch.ldexp(torch.ones_like(mantissa), exponent)
    return {"rows": codes, "power": power.bfloat16(), "rest": mantissa}


def linear(x: torch.Tensor, prepared: Prepared, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> [M, N]."""
    p = prepared
    return torch.ops.qig.cpu_w8a16(x, p["rows"], p["power"], p["rest"], bias)


def embedding(ids: torch.Tensor, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` [...] of a table in `dtype`: [..., K]."""
    scale = prepared["power"][ids].float() * prepared["rest"][ids]
    return (prepared["rows"][ids].float() * scale[..., None]).to(dtype)


def _linear(
    x: torch.Tensor,
    rows: torch.Tensor,
    power: torch.Tensor,
    rest: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K], the rest as `prepare` made it: [M, N] in x's dtype."""
    if x.dtype == torch.bfloat16 and len(x) < MANY_ROWS:
        out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), rows, power).float() * rest
    else:
        kind = x.dtype if x.dtype == torch.bfloat16 and multiplies_bf16() else torch.float32
        (n, k), given = rows.shape, x.to(kind)
        out = x.new_empty(len(x), n, dtype=torch.float32)
        step = max(1, _SCRATCH // k)
        for start in range(0, n, step):
            out[:, start : start + step] = F.linear(given, rows[start : start + step].to(kind))
        out *= power.float() * rest
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _fake(x: torch.Tensor, rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


define(
    "cpu_w8a16(Tensor x, Tensor rows, Tensor power, Tensor rest, Tensor? bias) -> Tensor",
    _linear,
    _fake,
)
