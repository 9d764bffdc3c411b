"""Quantize, dequantize, pack and unpack weights; quantize activations. Pure torch functions.

Codes are what a scheme stores (formats.py). Asymmetric codes are uint8, symmetric codes int8.
Shapes: weight [N, K]; scale and zero point [N, G] with G groups along K, the last one shorter where
the group size does not divide K. Arithmetic is in fp32.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from qig_serve.formats import QuantScheme, group_inputs

_EPS = 1e-8  # scale floor in fp32; the smallest normal number of the stored dtype wins if larger


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` as fp32, rounded to what `dtype` can store: above zero, and finite."""
    info = torch.finfo(dtype)
    return scale.float().clamp(max(_EPS, info.tiny), info.max).to(dtype).float()


def scale_dtype(scheme: QuantScheme, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the scheme stores scales."""
    return torch.float32 if scheme.group_size is None else model_dtype


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, K] -> [N, G, S], S inputs per group; a shorter last group is filled up with zeros."""
    n, k = weight.shape
    size = group_inputs(k, groups)
    if missing := groups * size - k:
        weight = F.pad(weight, (0, missing))
    return weight.reshape(n, groups, size)


def ungrouped(groups: torch.Tensor, k: int) -> torch.Tensor:
    """Inverse of `grouped`: [N, G, S] -> [N, K]."""
    return groups.flatten(1)[:, :k]


def minmax_params(
    weight: torch.Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale [N, G] (fp32, rounded to `dtype`) and zero point [N, G] (uint8) or None.

    The range of each group is its own minimum to maximum, widened to contain zero. Source:
    round-to-nearest, as in AWQ (arXiv 2306.00978).
    """
    w = grouped(weight.float(), scheme.num_groups(weight.shape[1]))  # [N, G, S]
    if scheme.symmetric:
        scale = round_scale(w.abs().amax(-1) / scheme.qmax, dtype)
        return scale, None
    lo = w.amin(-1).clamp(max=0)
    hi = w.amax(-1).clamp(min=0)
    scale = round_scale((hi - lo) / scheme.qmax, dtype)
    zero = (-lo / scale).round().clamp(0, scheme.qmax).to(torch.uint8)
    return scale, zero


def quantize(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """Codes [N, K]: round(weight / scale) + zero, clamped (uint8, or int8 if symmetric)."""
    w = grouped(weight.float(), scale.shape[1])
    q = (w / scale.float()[..., None]).round()
    if zero is not None:
        q = q + zero.float()[..., None]
    q = q.clamp(scheme.qmin, scheme.qmax)
    return ungrouped(q.to(torch.int8 if scheme.symmetric else torch.uint8), weight.shape[1])


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """(codes - zero) * scale in fp32, [N, K]."""
    q = grouped(codes.float(), scale.shape[1])
    if zero is not None:
        q = q - zero.float()[..., None]
    return ungrouped(q * scale.float()[..., None], codes.shape[1])


def fake_quantize(
    weight: torch.Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Round-to-nearest weight in fp32 with min-max ranges; scales rounded to `dtype`."""
    scale, zero = minmax_params(weight, scheme, dtype)
    return dequantize(quantize(weight, scale, zero, scheme), scale, zero)


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [..., K] and fp32 scale [..., 1]: symmetric, one scale per token.

    scale = max |x| / 127; codes = round half to even (x / scale), within -127..127. A token of
    zeros gets scale 1 and zero codes.
    """
    codes, scale = _activation_codes(x)
    return codes.to(torch.int8), scale


def fake_quantize_activation(x: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize activations token by token; same dtype as `x`."""
    codes, scale = _activation_codes(x)
    return codes.mul_(scale).to(x.dtype)


def _activation_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_activation`, the codes in fp32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, amax / 127, torch.ones_like(amax))
    return (x / scale).round_().clamp_(-127, 127), scale


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, K] -> int32 [N, K * bits / 32], dense and little-endian along K (formats.py).

    ValueError when K is not a multiple of 32 or a code does not fit.
    """
    n, k = codes.shape
    if k % 32:
        raise ValueError(f"packing needs a multiple of 32 codes per row, got {k}")
    low, high = (0, (1 << bits) - 1)
    if codes.dtype == torch.int8:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes must lie in {low}..{high} for {bits} bits")
    if bits == 8 and sys.byteorder == "little":
        return codes.contiguous().view(torch.int32)
    words = 32 * bits // 32
    fields = (codes.to(torch.int64) & ((1 << bits) - 1)).reshape(n, k // 32, 32)
    packed = torch.zeros(n, k // 32, words, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        packed[..., word] |= (fields[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:  # the code straddles two words
            packed[..., word + 1] |= fields[..., i] >> (32 - shift)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).reshape(n, k * bits // 32)


def unpack(packed: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Inverse of `pack`: int32 [N, K * bits / 32] -> codes [N, K], int8 if signed else uint8."""
    n = packed.shape[0]
    if bits == 8 and sys.byteorder == "little":
        return packed.contiguous().view(torch.int8 if signed else torch.uint8)
    words = packed.to(torch.int64).reshape(n, -1, bits) & 0xFFFFFFFF  # `bits` words hold 32 codes
    out = torch.empty(n, words.shape[1], 32, dtype=torch.int64, device=packed.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        field = words[..., word] >> shift
        if shift + bits > 32:
            field = field | (words[..., word + 1] << (32 - shift))
        out[..., i] = field & ((1 << bits) - 1)
    if signed:
        half = 1 << (bits - 1)
        out = (out ^ half) - half
    return out.to(torch.int8 if signed else torch.uint8).reshape(n, -1)


def pack_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: QuantScheme,
    model_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The tensors of formats.tensor_specs for one linear: suffix -> tensor."""
    tensors = {
        "weight_packed": pack(codes, scheme.bits),
        "weight_scale": scale.to(scale_dtype(scheme, model_dtype)).contiguous(),
    }
    if zero is not None:
        tensors["weight_zero_point"] = zero.to(torch.uint8).contiguous()
    return tensors


def unpack_linear(tensors: dict[str, torch.Tensor], scheme: QuantScheme) -> torch.Tensor:
    """The dequantized weight [N, K] in fp32 of the tensors of `pack_linear`."""
    codes = unpack(tensors["weight_packed"], scheme.bits, scheme.symmetric)
    return dequantize(codes, tensors["weight_scale"], tensors.get("weight_zero_point"))


_ROWS_AT_ONCE = 8192  # of a vocabulary: bounds the fp32 temporaries


def pack_rows(weight: torch.Tensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
    """The tensors of `pack_linear` of a weight [N, K] rounded to nearest, some rows at a time.

    For schemes with one scale per row, whose tensors are rows, too.
    """
    parts = []
    for rows in weight.split(_ROWS_AT_ONCE):
        scale, zero = minmax_params(rows, scheme)
        codes = quantize(rows, scale, zero, scheme)
        parts.append(pack_linear(codes, scale, zero, scheme, weight.dtype))
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


def unpack_rows(
    tensors: dict[str, torch.Tensor], scheme: QuantScheme, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] in `dtype` of the tensors of `pack_rows`, some rows at a time."""
    some = [
        dict(zip(tensors, rows, strict=True))
        for rows in zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in tensors.values()), strict=True)
    ]
    return torch.cat([unpack_linear(part, scheme).to(dtype) for part in some])
