"""The oracle's arithmetic against exact arithmetic and packing.py, and what it loses of x."""

from __future__ import annotations

import pytest
import torch

from qig_serve import packing
from qig_serve.kernels import reference

DTYPES = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All positive finite values of a 16-bit dtype."""
    values = torch.arange(1, 32768, dtype=torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_the_smallest_that_fit(dtype: torch.dtype) -> None:
    """For every value as the largest of its group, in exact arithmetic: fp64 holds it."""
    largest = every_value(dtype)
    padded = torch.nn.functional.pad(largest[:, None], (0, 127))
    halves, words = reference.split_halves(padded, 4)
    unit, sums = (of[:, 0] for of in reference.units_and_sums(words, 1))
    exact = largest.double()
    assert bool((torch.frexp(unit)[0] == 0.5).all()), "powers of two"
    assert bool((unit * 32639 >= exact).all())
    assert bool(((unit / 2 * 32639 < exact) | (unit == 2.0**-123)).all())
    q = 256 * halves[:, 0, 0].int() + halves[:, 1, 0].int()
    assert torch.equal(q, (exact / unit).round().int()) and int(q.max()) <= 32639
    assert torch.equal(q, sums)


def test_units_as_the_kernels_find_them() -> None:
    """bits(largest * fp32(1 / 32639)), exponent rounded up: the same for every 16-bit value."""
    for dtype in DTYPES:
        largest = every_value(dtype)
        product = largest.float() * torch.tensor(1 / 32639)
        bits = (product.view(torch.int32) + 0x007FFFFF) & 0x7F800000
        unit = bits.clamp(min=4 << 23).view(torch.float32)
        padded = torch.nn.functional.pad(largest[:, None], (0, 127))
        found, _ = reference.units_and_sums(reference.split_halves(padded, 4)[1], 1)
        assert torch.equal(unit.double(), found[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_q_has_its_halves(dtype: torch.dtype) -> None:
    """q from -32640 to 32639 are two int8, and come back; fours are stored 0, 2, 1, 3."""
    q = torch.arange(-32640, 32640, dtype=torch.int32)
    high = (q + 128) >> 8
    low = q - 256 * high
    assert int(high.min()) == -128 + 1 and int(high.max()) == 127
    assert int(low.min()) == -128 and int(low.max()) == 127
    assert torch.equal(low.to(torch.int8), (q & 255).to(torch.uint8).view(torch.int8))
    x = torch.zeros(1, 128, dtype=dtype)
    x[0, :8] = torch.arange(1, 9) * 1024
    halves, words = reference.split_halves(x, 4)
    first = 256 * halves[0, 0, :8].int() + halves[0, 1, :8].int()
    unit, _ = reference.units_and_sums(words, 1)
    assert (first * unit[0, 0] / 1024).tolist() == [1, 3, 2, 4, 5, 7, 6, 8]


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 3584, generator=generator)
    outlier = x.clone()
    outlier[:, 77] *= 10_000
    zeros = x.clone()
    zeros[::2] = 0
    largest = 65504 / 3 if dtype == torch.float16 else 1e38
    return {
        "ordinary": x, "outlier": outlier, "zeros": zeros, "tiny": x * 1e-7, "denormal": x * 1e-38,
        "large": x.clamp(-3, 3) * largest,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ordinary", "outlier", "zeros", "tiny", "denormal", "large"])
def test_halves_stand_for_x(name: str, dtype: torch.dtype) -> None:
    """Within half a unit, far closer than 16 bits round; near a group's largest, exactly."""
    wide = cases(dtype)[name]
    x = wide.to(dtype)
    halves, words = reference.split_halves(x, 16)
    joined, exact = reference.join_halves(halves, words, 16), x.double()
    unit, sums = reference.units_and_sums(words, x.shape[1] // 128)
    unit = unit.repeat_interleave(128, 1)
    assert bool(((joined - exact).abs() <= unit / 2).all())
    largest = exact.unflatten(1, (-1, 128)).abs().amax(-1).repeat_interleave(128, 1)
    near = exact.abs() * (64 if dtype == torch.bfloat16 else 8) >= largest
    near &= unit > 2.0**-123  # else x itself is of few bits
    assert torch.equal(joined[near], exact[near])
    whole = joined.unflatten(1, (-1, 128)).sum(-1) / (unit[:, ::128])
    assert torch.equal(whole.round().int(), sums)
    if name != "denormal":  # bf16 and fp16 themselves are off by 1.7e-3 and 2.1e-4
        error = float((joined - exact).norm() / exact.norm())
        assert error < (2e-4 if name == "outlier" else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_costs_its_group_alone(dtype: torch.dtype) -> None:
    """10,000 times the rest: its own group is off by 2^-15 of it at most, where bf16 products are
    by 2^-9; no other group notices."""
    x = cases(dtype)["outlier"].to(dtype)
    joined = reference.join_halves(*reference.split_halves(x, 32), 32)
    error = (joined - x.double()).abs()
    assert float((error[:, :128].amax(1) / x[:, :128].double().abs().amax(1)).max()) < 2.0**-15
    assert float(error[:, 128:].max()) < 2.0**-12 * 4


def test_codes_differ_from_packing_at_ties_alone() -> None:
    """By one step, and only where x / scale is a half to fp32's accuracy. Of 16-bit floats over a
    16-bit float that is one in a thousand, and neither neighbour is nearer."""
    generator = torch.Generator().manual_seed(11)
    for dtype in DTYPES:
        x = (torch.randn(256, 3584, generator=generator) * 3).to(dtype)
        codes, scale = reference.quantize_activation(x)
        other, other_scale = packing.quantize_activation(x)
        torch.testing.assert_close(scale, other_scale, rtol=2.0**-22, atol=0)
        difference = (codes.int() - other.int()).abs()
        assert int(difference.max()) <= 1
        quotient = (x.double() * 127 / x.double().abs().amax(-1, keepdim=True))[difference > 0]
        assert float((quotient - quotient.floor() - 0.5).abs().max()) < 127 * 2.0**-22
        assert len(quotient) < x.numel() / (1000 if dtype == torch.bfloat16 else 5000)


def test_tokens_without_a_scale() -> None:
    """Zeros, values whose inverse scale would overflow, NaN and infinity."""
    x = torch.randn(5, 256).bfloat16()
    x[0] = 0
    x[1] = 2.0**-133
    x[2, 3] = torch.nan
    x[3, 200] = -torch.inf
    codes, scale = reference.quantize_activation(x)
    assert scale[0] == 1 and scale[1] == 2.0**-126
    assert scale[2:4].isnan().all() and scale[4].isfinite()
    assert not codes[:4].any() and codes[4].abs().max() == 127
    halves, words = reference.split_halves(x, 4)
    unit, sums = reference.units_and_sums(words, 2)
    assert (unit[:2] == 2.0**-123).all()
    assert unit.isnan().nonzero().tolist() == [[2, 0], [3, 1]]
    assert not halves[2, :, :128].any() and halves[2, :, 128:].any() and not sums[2, 0]


def test_gelu_is_that_of_torch() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 3
    gate, up = x.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(reference.silu_mul(x, "gelu_tanh").double(), expected)
