"""Quantize, dequantize, pack and unpack: exact round trips, golden bytes, bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qig_serve import packing
from qig_serve.formats import SCHEMES, tensor_specs

SCHEME_NAMES = sorted(SCHEMES)


def _weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_stored_tensors_have_the_declared_shapes_and_dtypes(name: str) -> None:
    scheme = SCHEMES[name]
    weight = _weight(5, 384)
    scale, zero = packing.minmax_params(weight, scheme, torch.bfloat16)
    codes = packing.quantize(weight, scale, zero, scheme)
    tensors = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
    specs = tensor_specs(scheme, 5, 384)
    assert tensors.keys() == specs.keys()
    for suffix, spec in specs.items():
        assert tuple(tensors[suffix].shape) == spec.shape
        wanted = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
        assert tensors[suffix].dtype == wanted


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SCHEME_NAMES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_pack_unpack_round_trip(name: str, rows: int, groups: int, seed: int) -> None:
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if scheme.symmetric else torch.uint8
    codes = torch.randint(
        scheme.qmin, scheme.qmax + 1, (rows, 32 * groups), generator=generator
    ).to(dtype)
    packed = packing.pack(codes, scheme.bits)
    assert packed.shape == (rows, groups * scheme.bits)
    assert torch.equal(packing.unpack(packed, scheme.bits, scheme.symmetric), codes)


RAGGED = (32, 96, 160, 576, 960)


@pytest.mark.parametrize("k", RAGGED)
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_a_shorter_last_group(name: str, k: int) -> None:
    """Stored and read again; whole groups are as they are without it, and it as it is alone."""
    scheme, whole = SCHEMES[name], k // 128 * 128
    weight = _weight(5, k)

    def stored(part: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scale, zero = packing.minmax_params(part, scheme, torch.bfloat16)
        codes = packing.quantize(part, scale, zero, scheme)
        assert torch.equal(
            packing.grouped(part, scale.shape[1]).flatten(1)[:, : part.shape[1]], part
        )
        tensors = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
        assert torch.equal(
            packing.unpack(tensors["weight_packed"], scheme.bits, scheme.symmetric), codes
        )
        back = packing.unpack_linear(tensors, scheme)
        assert torch.equal(back, packing.dequantize(codes, scale, zero))
        return tensors, back

    tensors, back = stored(weight)
    for suffix, spec in tensor_specs(scheme, 5, k).items():
        assert tuple(tensors[suffix].shape) == spec.shape
    if scheme.group_size and whole:
        first, last = stored(weight[:, :whole])[1], stored(weight[:, whole:])[1]
        assert torch.equal(back, torch.cat([first, last], dim=1))


def test_golden_words() -> None:
    """The layout on disk is versioned: these words may change only with format_version."""
    codes3 = (torch.arange(32) % 8).to(torch.uint8)[None]
    bits = "".join(format(int(c), "03b")[::-1] for c in codes3[0])
    words = [int(bits[i : i + 32][::-1], 2) for i in (0, 32, 64)]
    signed = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
    assert packing.pack(codes3, 3).tolist() == [signed]
    codes4 = torch.tensor([[-8, -1, 0, 7, 1, 2, 3, -4] * 4], dtype=torch.int8)
    nibbles = [0x8, 0xF, 0x0, 0x7, 0x1, 0x2, 0x3, 0xC]
    word = sum(v << (4 * i) for i, v in enumerate(nibbles))
    assert packing.pack(codes4, 4).tolist() == [[word - (1 << 32)] * 4]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SCHEME_NAMES),
    seed=st.integers(0, 2**31),
    exponent=st.floats(-6, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_at_most_half_a_step(
    name: str, seed: int, exponent: float, dtype: torch.dtype
) -> None:
    """Within the range, rounding is off by half a scale; a rounded scale costs a little more."""
    scheme = SCHEMES[name]
    reach = torch.finfo(dtype).max / 4  # a weight of the model's dtype, all of its range too
    weight = (_weight(3, 256, seed) * 10.0**exponent).clamp(-reach, reach)
    scale, zero = packing.minmax_params(weight, scheme, dtype)
    codes = packing.quantize(weight, scale, zero, scheme)
    back = packing.dequantize(codes, scale, zero)
    step = scale.repeat_interleave(256 // scale.shape[1], dim=1)
    # The zero point is rounded too, which can push an end of the range out by half a step.
    slack = 1.0 if zero is not None else 0.5
    slack += scheme.qmax * 2.0**-8
    assert ((back - weight).abs() <= slack * step + 1e-7).all()


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_dequantized_weights_are_a_fixed_point(name: str) -> None:
    scheme = SCHEMES[name]
    weight = _weight(4, 256)
    scale, zero = packing.minmax_params(weight, scheme)
    codes = packing.quantize(weight, scale, zero, scheme)
    again = packing.quantize(packing.dequantize(codes, scale, zero), scale, zero, scheme)
    assert torch.equal(codes, again)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_constant_and_zero_groups(name: str) -> None:
    scheme = SCHEMES[name]
    weight = torch.zeros(3, 256)
    weight[1] = 0.7
    weight[2] = -0.7
    scale, zero = packing.minmax_params(weight, scheme)
    back = packing.dequantize(packing.quantize(weight, scale, zero, scheme), scale, zero)
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back, weight, atol=1e-6, rtol=1e-6)


def test_pack_refuses_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="0..7"):
        packing.pack(torch.full((1, 32), 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="multiple of 32"):
        packing.pack(torch.zeros(1, 31, dtype=torch.uint8), 3)


def test_activation_codes() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [127.0, 0.5]])
    codes, scale = packing.quantize_activation(x)
    assert codes.tolist() == [[0, 0], [64, -127], [127, 0]]  # 63.5 and 0.5 round half to even
    assert scale[0].item() == 1.0
    torch.testing.assert_close(scale[1:, 0], torch.tensor([2 / 127, 1.0]))
    assert packing.fake_quantize_activation(x.bfloat16()).dtype == torch.bfloat16


def test_rows_are_packed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary's table in 8 bits: as whole, and its words are the codes' own bytes."""
    monkeypatch.setattr(packing, "_ROWS_AT_ONCE", 3)
    scheme = SCHEMES["w8a16"]
    weight = torch.randn(8, 128).bfloat16()
    weight[5] = 0
    stored = packing.pack_rows(weight, scheme)
    scale, _ = packing.minmax_params(weight, scheme)
    codes = packing.quantize(weight, scale, None, scheme)
    assert torch.equal(stored["weight_packed"].view(torch.int8), codes)
    assert torch.equal(stored["weight_packed"], packing.pack(codes, 8))
    assert {k: (v.shape, str(v.dtype)[6:]) for k, v in stored.items()} == {
        k: (torch.Size(s.shape), s.dtype) for k, s in tensor_specs(scheme, 8, 128).items()
    }
    found = packing.unpack_rows(stored, scheme, torch.float32)
    assert torch.equal(found, packing.unpack_linear(stored, scheme))
    assert float((found - weight.float()).abs().max()) <= float(scale.max()) / 2 * 1.001
