"""Nothing is lost between weights, codes, words on disk, and the kernels' own layout."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qig_serve import packing
from qig_serve.formats import SCHEMES, QuantScheme, tensor_specs
from qig_serve.kernels import layout

SERVED = [s for s in SCHEMES.values() if s.servable]
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=60, deadline=None)


def words(rows: int, groups: int, bits: int, seed: int) -> torch.Tensor:
    """Any bits at all, int32 [rows, groups * 128 * bits / 32]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * 4 * bits)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


@FEW
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(1, 9), st.integers(1, 3), SEEDS)
def test_every_word_is_some_codes(
    bits: int, signed: bool, rows: int, groups: int, seed: int
) -> None:
    """Packing is one to one in this direction too: no bit of a word is without meaning."""
    stored = words(rows, groups, bits, seed)
    assert torch.equal(packing.pack(packing.unpack(stored, bits, signed), bits), stored)


@FEW
@given(st.integers(1, 300), st.integers(1, 4), DTYPES, SEEDS)
def test_w3a16_layout(rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = words(rows, groups, 3, seed)
    scale = torch.rand(rows, groups, generator=generator).to(dtype)
    zero = torch.randint(0, 8, (rows, groups), generator=generator).to(torch.uint8)
    order = (16, 32)[seed % 2]
    kept = layout.repack_w3a16(packed, scale, zero, order)
    codes, *rest = layout.unpack_w3a16(
        kept["weight_planes"], kept["scale_zero"], rows, 128 * groups, order, dtype
    )
    assert torch.equal(packing.pack(codes, 3), packed)
    assert torch.equal(rest[0], scale) and torch.equal(rest[1], zero)
    assert not kept["scale_zero"][:, rows:].any()


@FEW
@given(st.integers(1, 300), st.integers(1, 4), SEEDS)
def test_w4a8_layout(rows: int, groups: int, seed: int) -> None:
    packed = words(rows, groups, 4, seed)
    scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))
    kept = layout.repack_w4a8(packed, scale)
    codes, back = layout.unpack_w4a8(kept["weight_nibbles"], kept["channel_scale"], rows)
    assert torch.equal(packing.pack(codes, 4), packed) and torch.equal(back, scale)
    assert not kept["channel_scale"][rows:].any()


@FEW
@given(
    st.sampled_from(SERVED),
    st.integers(1, 4),
    st.integers(1, 3),
    DTYPES,
    st.floats(-40, 37),
    st.sampled_from(["normal", "zeros", "constant", "one-sided", "lone"]),
    SEEDS,
)
def test_weights_to_disk_and_back(
    scheme: QuantScheme,
    rows: int,
    groups: int,
    dtype: torch.dtype,
    power: float,
    kind: str,
    seed: int,
) -> None:
    """Of any size and shape: finite, of the declared shapes, and a fixed point of quantization."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 128 * groups, generator=generator)
    weight = {
        "normal": weight,
        "zeros": torch.zeros_like(weight),
        "constant": torch.ones_like(weight),
        "one-sided": weight.abs(),
        "lone": torch.nn.functional.one_hot(torch.tensor([5] * rows), 128 * groups).float(),
    }[kind] * 10.0**power
    scale, zero = packing.minmax_params(weight, scheme, packing.scale_dtype(scheme, dtype))
    codes = packing.quantize(weight, scale, zero, scheme)
    stored = packing.pack_linear(codes, scale, zero, scheme, dtype)
    for suffix, spec in tensor_specs(scheme, rows, 128 * groups).items():
        assert tuple(stored[suffix].shape) == spec.shape
    back = packing.unpack_linear(stored, scheme)
    assert bool(torch.isfinite(back).all())
    assert torch.equal(back, packing.dequantize(codes, scale, zero))
    assert torch.equal(packing.quantize(back, scale, zero, scheme), codes)
