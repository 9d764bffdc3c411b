"""The oracle: what every kernel must compute, in plain torch and fp32. No triton.

Inputs are those of the checkpoint (formats.py), so a wrong kernel layout cannot hide in here.
"""

from __future__ import annotations

import torch

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import layout


def w3a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] @ dequantized weight^T (+ bias) in fp32: [M, N]."""
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zero}
    out = x.float() @ packing.unpack_linear(tensors, SCHEMES["w3a16"]).t()
    return out if bias is None else out + bias.float()


def int_product(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Activation codes int8 [M, K] times weight codes, exact: int64 [M, N]."""
    weight = packing.unpack(packed, 4, signed=True)
    # Double holds every sum of products below 2^53 exactly and is far faster than int64 matmul.
    return (codes[:, : weight.shape[1]].double() @ weight.double().t()).to(torch.int64)


def w4a8_linear_quantized(
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """codes int8 [M, K], x_scale fp32 [M, 1]; integer product, rescaled (+ bias): fp32 [M, N]."""
    out = int_product(codes, packed).float() * x_scale * scale.float().t()
    return out if bias is None else out + bias.float()


def w4a8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x [M, K] per token, then `w4a8_linear_quantized`: fp32 [M, N]."""
    return w4a8_linear_quantized(*quantize_activation(x), packed, scale, bias)


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [M, K'] and fp32 scale [M, 1], as the kernels have them: K' whole groups of 128.

    packing.quantize_activation with a product by 1 / scale, rounded once, for its quotient: where x
    / scale is within an ulp of a half, a code may be the next. scale is at least 2^-126 (1 for a
    token of zeros), and NaN, with zero codes, where a token has a NaN or an infinity.
    """
    x = layout.whole_groups(x).float()
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(1 / 127, dtype=torch.float32, device=x.device)
    scale = (largest * inverse).clamp(min=2.0**-126)
    scale = torch.where(largest > 0, scale, 1.0)
    product = x.double() * (1 / scale).double()  # exact
    finite = largest.isfinite()
    codes = torch.where(finite, product, 0.0).round().to(torch.int8)
    return codes, torch.where(finite, scale, torch.nan)


def experts(
    x: torch.Tensor,
    routing: torch.Tensor,
    ids: torch.Tensor,
    gate_up: list[dict[str, torch.Tensor]],
    down: list[dict[str, torch.Tensor]],
    scheme: str,
    activation: str = "silu",
) -> torch.Tensor:
    """A mixture-of-experts layer for x [M, K]: fp32 [M, K].

    routing, ids [M, top_k], id -1 for an expert that is elsewhere; gate_up and down: an expert's
    tensors of formats.tensor_specs. Rows between the two linears are rounded to x's dtype, as they
    are stored.
    """
    linear = w3a16_linear if scheme == "w3a16" else w4a8_linear
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(down)):
        tokens, choice = torch.nonzero(ids == expert, as_tuple=True)
        if len(tokens):
            hidden = linear(x[tokens], *gate_up[expert].values()).to(x.dtype)
            part = linear(silu_mul(hidden, activation), *down[expert].values())
            out.index_add_(0, tokens, part * routing[tokens, choice, None].float())
    return out


_MOST = 32639  # 127 * 256 + 127
_SUM = (1 << 23) - 1  # bits of the sum in a word


def split_halves(x: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as 16-bit fixed point: halves int8 [M, 2, K'], x_scale_sum int32 [pairs, M, 2].

    K': whole groups of 128. A (token, group) has unit s, the smallest power of two from 2^-123 with
    largest / s <= 32639, and q = x / s rounded half to even = 256 * high + low. halves: the high
    ones, then the low, inputs in layout.ORDERS[order]. x_scale_sum: bits 23-30 are those of s / 8
    in fp32, bits 0-22 minus the sum of q in two's complement; of an odd number of groups the last
    pair's second is one of zeros. A group with a NaN or an infinity has the bits of infinity, and
    zeros."""
    groups = layout.whole_groups(x).unflatten(-1, (-1, layout.GROUP)).double()
    largest = groups.abs().amax(-1)
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 0.0)
    _, exponent = torch.frexp(largest / _MOST)  # = f * 2^exponent, f from 1/2 up to below 1
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    half = unit / 2
    unit = torch.where(half * _MOST >= largest, half, unit)
    unit = torch.where(largest > 0, unit, 0.0).clamp(min=2.0**-123)
    q = torch.where(finite[..., None], groups / unit[..., None], 0.0).round().to(torch.int32)
    high = (q + 128) >> 8
    both = torch.stack([high, q - 256 * high], dim=1)[..., layout.ORDERS[order]]
    eighth = torch.where(finite, unit / 8, torch.inf).float().view(torch.int32)
    words = eighth | (-q.sum(-1, dtype=torch.int32) & _SUM)
    smallest = torch.tensor(2.0**-126).view(torch.int32).item()
    words = torch.nn.functional.pad(words, (0, words.shape[1] % 2), value=smallest)
    return both.flatten(2).to(torch.int8), words.unflatten(1, (-1, 2)).transpose(0, 1).contiguous()


def units_and_sums(x_scale_sum: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The units s, fp64 [M, groups] (NaN where infinite), and the sums of q, int32, of the
    words."""
    words = x_scale_sum.transpose(0, 1).flatten(1)[:, :groups]
    unit = 8 * (words & ~_SUM).contiguous().view(torch.float32).double()
    unit = torch.where(unit.isfinite(), unit, torch.nan)
    return unit, -((words << 9) >> 9)


def join_halves(halves: torch.Tensor, x_scale_sum: torch.Tensor, order: int) -> torch.Tensor:
    """What `split_halves` stands for: fp64 [M, K]."""
    ordered = halves.double().unflatten(-1, (-1, layout.GROUP))
    both = torch.empty_like(ordered)
    both[..., layout.ORDERS[order]] = ordered
    q = 256 * both[:, 0] + both[:, 1]
    unit, _ = units_and_sums(x_scale_sum, q.shape[1])
    return (q * unit[..., None]).flatten(-2)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalized x, x + residual), both of x's dtype and each rounded once, from fp32.

    So vLLM computes it where it compiles (quantize_activation.py says where that is read);
    transformers' models round the sum before they normalize it, and again before the weight.
    """
    h = x.float() if residual is None else x.float() + residual.float()
    added = h.to(x.dtype)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype), added


def silu_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up of [M, 2 K], rounded once from fp32: [M, K] of its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        gated = gate / (1 + torch.exp(-gate))
    else:
        assert activation == "gelu_tanh"
        x = gate.double()  # 1 + tanh(z / 2), written so that nothing is lost where it is small
        gated = (x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))).float()
    return (gated * up).to(gate_up.dtype)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rms_norm`, then `quantize_activation`: codes, scale, x + residual."""
    normalized, added = rms_norm(x, weight, eps, residual)
    return *quantize_activation(normalized), added


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul`, then `quantize_activation`."""
    return quantize_activation(silu_mul(gate_up))
