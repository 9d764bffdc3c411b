"""The activation quantizers against the oracle, bit for bit where arithmetic allows it.

Collected as kernel_checks.py is. Sums of squares depend on their order in fp32's last bit, so the
fused RMSNorm is compared bit for bit on inputs whose squares add up exactly in any order, and
within a step of the 16-bit value on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, INTERPRETED
from poison import poison_allocations
from triton.errors import TritonError

from qig_serve.kernels import (
    fused_linear,
    launch,
    layout,
    quantize_activation,
    quantizer_ops,
    reference,
)
from qig_serve.kernels.library import define
from qig_serve.kernels.tiles import Tile

SHAPES = [(1, 128), (3, 3584), (7, 1152), (4, 1024), (17, 384), (2, 1088)]
ops = torch.ops.qig
ORDER = launch.orders(DEVICE).activations
NEW = INTERPRETED or launch.orders_of((8, 0)).activations == 32
"""Compiled by 3.6, the permutation of order 32 is wrong; from 3.8 on it is used."""


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels allocate is full of NaN (integers: their largest): unwritten places show."""
    poison_allocations(monkeypatch)


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Bit for bit, NaN equal to NaN; an [M] scale may be the oracle's [M, 1]."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one, other.reshape(one.shape), rtol=0, atol=0, equal_nan=one.is_floating_point()
        )


def assert_codes_close(
    got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """All but one code in a hundred the same, and those by one: a largest value's last bit moves
    a row's scale."""
    torch.testing.assert_close(got[1][:, None], expected[1], rtol=8e-3, atol=0)
    apart = (got[0].int() - expected[0].int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01


def ordinary(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, one token of zeros, and one channel 10,000 times the rest."""
    generator = torch.Generator().manual_seed(m * 31 + k)
    x = torch.randn(m, k, generator=generator)
    if m > 2:
        x[0] = 0
        x[2:, 5] *= 10_000
    return x.to(DEVICE, dtype)


def in_eighths(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/8 within 3: fp32 adds 18,944 squares (of sums too) exactly in any order."""
    generator = torch.Generator().manual_seed(m * 37 + k)
    return (torch.randint(-24, 25, (m, k), generator=generator) / 8).to(DEVICE, dtype)


def norm_weight(k: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    return (torch.rand(k, generator=generator) + 0.5).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (7, 300), (2, 18944)])
def test_codes(m: int, k: int, dtype: torch.dtype) -> None:
    x = ordinary(m, k, dtype)
    assert_same(ops.quantize_activation(x), reference.quantize_activation(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (2, 18944)])
def test_halves(m: int, k: int, dtype: torch.dtype) -> None:
    x = ordinary(m, k, dtype)
    assert_same(ops.split_halves(x), reference.split_halves(x, ORDER))


@pytest.mark.parametrize("order", [order for order in layout.ORDERS if order != 32 or NEW])
def test_halves_in_every_order(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = launch.Orders(16, order, order)
    monkeypatch.setattr(launch, "orders", lambda device: orders)
    x = ordinary(3, 640, torch.bfloat16)  # an odd number of groups
    assert_same(ops.split_halves(x), reference.split_halves(x, order))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_every_value(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 65,536 bit patterns as the largest of a group: the unit, and every boundary."""
    if INTERPRETED:
        monkeypatch.setattr(quantize_activation, "CHUNK", 65536)
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.zeros(len(values), 128, dtype=dtype)
    x[:, 17] = values
    x[:, 18] = -values
    x[:, 63] = values / 3
    x = x.view(1, -1).to(DEVICE)
    assert_same(ops.split_halves(x), reference.split_halves(x, ORDER))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_value(dtype: torch.dtype) -> None:
    """Each bit pattern in a token, whose largest is the bit pattern of another: 256 tokens."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = values.view(256, 256).to(DEVICE)
    assert_same(ops.quantize_activation(x), reference.quantize_activation(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_the_scale(dtype: torch.dtype, bad: float) -> None:
    x = ordinary(5, 384, dtype)
    x[1, 200] = bad
    codes, scale = ops.quantize_activation(x)
    assert scale.isnan().tolist() == [False, True, False, False, False]
    assert not codes[1].any() and codes[3].any()
    assert_same((codes, scale), reference.quantize_activation(x))
    halves, words = ops.split_halves(x)
    unit, sums = reference.units_and_sums(words, 3)
    assert unit.isnan().nonzero().tolist() == [[1, 1]]
    assert not halves[1, :, 128:256].any() and not sums[1, 1] and halves[1, :, :128].any()
    assert_same((halves, words), reference.split_halves(x, ORDER))
    weight = norm_weight(384, dtype)
    assert ops.rms_norm_quantize(x, weight, 1e-6, x)[1].isnan().tolist()[:2] == [False, True]
    unit, _ = reference.units_and_sums(ops.rms_norm_halves(x, weight, 1e-6, None)[1], 3)
    assert unit[1].isnan().any()
    assert ops.silu_mul_quantize(torch.cat([x, x], 1))[1].isnan().tolist()[:2] == [False, True]


@pytest.mark.parametrize(
    ("m", "k", "dtype", "with_residual"),
    [
        (*shape, dtype, (i + j) % 2 == 1)  # of a shape one dtype with, the other without
        for i, shape in enumerate([*SHAPES, (2, 18944)])
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_rms_norm(m: int, k: int, dtype: torch.dtype, with_residual: bool) -> None:
    """Fused is RMSNorm and then the quantizer, to the bit.

    Of the oracle's RMSNorm a GPU's may be an ulp of fp32 off, which moves few values by a step.
    """
    x, weight = in_eighths(m, k, dtype), norm_weight(k, dtype)
    given = in_eighths(m + 1, k, dtype)[1:] if with_residual else None
    expected, added = reference.rms_norm(x, weight, 1e-5, given)
    normalized, _ = ops.rms_norm(x, weight, 1e-5, given)
    assert float((normalized != expected).float().mean()) < 1e-3
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(normalized, expected, rtol=step, atol=0)
    *codes, got = ops.rms_norm_quantize(x, weight, 1e-5, given)
    assert_same((got,), (added if with_residual else added[:0, 0],))
    assert_same(tuple(codes), ops.quantize_activation(normalized))
    *halves, got = ops.rms_norm_halves(x, weight, 1e-5, given)
    assert_same((got,), (added if with_residual else added[:0, 0],))
    assert_same(tuple(halves), ops.split_halves(normalized))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_any_input(dtype: torch.dtype) -> None:
    """An ulp of the mean square moves few values, each to its neighbour."""
    x, residual = (torch.randn(9, 1408).to(DEVICE, dtype) for _ in range(2))
    weight = norm_weight(1408, dtype)
    normalized, added = reference.rms_norm(x, weight, 1e-6, residual)
    halves, words, got = ops.rms_norm_halves(x, weight, 1e-6, residual)
    assert_same((got,), (added,))
    joined = reference.join_halves(halves, words, ORDER)
    plain = reference.join_halves(*reference.split_halves(normalized, ORDER), ORDER)
    assert float((joined != plain).double().mean()) < 1e-3
    torch.testing.assert_close(joined, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    codes, scale, _ = ops.rms_norm_quantize(x, weight, 1e-6, residual)
    assert_codes_close((codes, scale), reference.quantize_activation(normalized))


def test_the_sum_is_normalized_before_it_is_rounded() -> None:
    """vLLM's order: in bf16, 256 + 1 rounds to 256, but 257 is what is normalized."""
    x = torch.full((1, 128), 256.0, dtype=torch.bfloat16, device=DEVICE)
    residual = torch.ones_like(x)
    residual[0, ::2] = 0
    weight = torch.full_like(x[0], 1.0)
    halves, words, added = ops.rms_norm_halves(x, weight, 0.0, residual)
    assert torch.equal(added, x)
    joined = reference.join_halves(halves, words, ORDER)
    expected = (x.double() + residual.double()) / 256.5
    assert torch.equal(joined, expected.bfloat16().double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_silu_mul(m: int, k: int, dtype: torch.dtype) -> None:
    """exp may differ by an ulp of fp32, which one 16-bit value in a thousand shows."""
    gate_up = (torch.randn(m, 2 * k) * 3).to(DEVICE, dtype)
    expected = reference.silu_mul(gate_up)
    halves, words = ops.silu_mul_halves(gate_up)
    joined = reference.join_halves(halves, words, ORDER)
    plain = reference.join_halves(*reference.split_halves(expected, ORDER), ORDER)
    assert float((joined != plain).double().mean()) < 1e-3
    torch.testing.assert_close(joined, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert_codes_close(ops.silu_mul_quantize(gate_up), reference.quantize_activation(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [160, 1312])  # shorter than a chunk, and longer; a ragged last group
def test_gelu_mul(k: int, dtype: torch.dtype) -> None:
    """As experts have it: in 16 bits, in codes and in halves."""
    gate_up = (torch.randn(5, 2 * k) * 3).to(DEVICE, dtype)
    gate_up[0, :6] = torch.tensor([-200.0, 200.0, -30.0, 30.0, 0.0, -0.0])
    expected = reference.silu_mul(gate_up, "gelu_tanh")
    plain = quantize_activation.silu_mul(gate_up, "gelu_tanh")
    assert float((plain != expected).double().mean()) < 5e-3  # last bits of exp and of 1 + tanh
    torch.testing.assert_close(plain, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    halves = quantize_activation.silu_mul_halves(gate_up, activation="gelu_tanh")
    order = quantize_activation.launch.orders(DEVICE).activations
    assert all(map(torch.equal, halves, reference.split_halves(plain, order)))
    codes = quantize_activation.silu_mul_quantize(gate_up, "gelu_tanh")
    assert all(map(torch.equal, codes, quantize_activation.quantize(plain)))


def test_an_activation_that_there_is_not() -> None:
    with pytest.raises(TritonError, match="static_assert|AssertionError"):
        quantize_activation.silu_mul(torch.ones(1, 64, device=DEVICE).half(), "gelu")


@pytest.mark.parametrize(
    "quantizer",
    [
        ops.quantize_activation,
        lambda x: ops.rms_norm_quantize(x, norm_weight(256, x.dtype), 1e-6, x),
        ops.silu_mul_quantize,
        lambda x: ops.rms_norm(x, norm_weight(256, x.dtype), 1e-6, x),
        ops.split_halves,
        lambda x: ops.rms_norm_halves(x, norm_weight(256, x.dtype), 1e-6, x),
        ops.silu_mul_halves,
    ],
)
def test_a_token_is_the_same_in_any_batch(
    quantizer: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many tokens take other warps, and whatever the strides or the alignment."""
    if INTERPRETED:
        monkeypatch.setattr(quantize_activation, "MANY_TOKENS", 20)
    x = torch.randn(quantize_activation.MANY_TOKENS + 3, 256).to(DEVICE, torch.float16)
    many, few = quantizer(x), quantizer(x[:2])
    for one, other in zip(many, few, strict=True):
        tokens = 1 if one.dim() == 3 and one.shape[1] == len(x) else 0
        assert torch.equal(one.narrow(tokens, 0, 2), other)
    strided = x[:2].t().contiguous().t()
    shifted = torch.zeros(513, dtype=x.dtype, device=DEVICE)[1:].view(2, 256).copy_(x[:2])
    for other in (strided, shifted):
        assert_same(quantizer(other), few)
    assert all(not t.numel() for t in quantizer(x[:0].clone())[:1])


@pytest.mark.parametrize(
    ("k", "few", "many"),
    [(128, 4, 4), (3584, 8, 4), (4096, 8, 4), (18944, 16, 16), (65536, 32, 32)],
)
def test_warps(k: int, few: int, many: int) -> None:
    warps = [quantize_activation.row_options(k, m)["num_warps"] for m in (1, 511, 512, 8192)]
    assert warps == [few, few, many, many]
    with pytest.raises(ValueError, match="longer than 65536"):
        quantize_activation.row_options(65537)


PROBE_TILE = Tile("halves", 8, 128)


def _probe(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


def _probe_of_halves(x: torch.Tensor, weight: torch.Tensor) -> fused_linear.OfHalves | None:
    """The GEMM of halves for up to 4 tokens; its sums are checked on the way."""

    def gemm(halves: quantize_activation.Halves) -> torch.Tensor:
        joined = reference.join_halves(*halves, ORDER)
        unit, sums = reference.units_and_sums(halves[1], x.shape[1] // 128)
        expected = joined.unflatten(1, (-1, 128)).sum(2) / unit
        assert torch.equal(sums, expected.round().int())
        return (joined @ weight.double()).to(x.dtype) + 1

    return (PROBE_TILE, gemm) if x.shape[0] <= 4 else None


def _fake_probe(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


define("probe_linear(Tensor x, Tensor weight) -> Tensor", _probe, _fake_probe)
fused_linear.define_fused("probe_linear", "Tensor weight", _probe, _probe_of_halves, _fake_probe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 3, 4, 5, 19])
def test_a_fused_linear_takes_halves_of_few_tokens(m: int, dtype: torch.dtype) -> None:
    """The GEMM here adds one, which shows that it ran."""
    x, residual, gate_up = (in_eighths(m + i, 384, dtype)[i:] for i in range(3))
    gate_up = torch.cat([gate_up, x], 1)
    norm, weight = norm_weight(384, dtype), torch.randn(384, 40).to(DEVICE, dtype) * 0.05
    few = m <= 4
    for given in (None, residual):
        out, added = ops.rms_norm_probe_linear(x, norm, 1e-6, given, weight)
        normalized, total = reference.rms_norm(x, norm, 1e-6, given)
        assert_same((added,), (total if given is not None else total[:0, 0],))
        assert out.dtype == dtype and out.shape == (m, 40)
        exact = normalized.double() @ weight.double() + few
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
    out = ops.silu_mul_probe_linear(gate_up, weight)
    exact = reference.silu_mul(gate_up).double() @ weight.double() + few
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("with_residual", [False, True])
def test_fakes_are_like_what_comes_out(with_residual: bool) -> None:
    x, norm = ordinary(3, 256, torch.bfloat16), norm_weight(256, torch.bfloat16)
    residual = x.clone() if with_residual else None
    weight, half = (torch.randn(k, 40, device=DEVICE).bfloat16() for k in (256, 128))
    normed = (x, norm, 1e-6, residual)
    for op, arguments in (
        (ops.quantize_activation, (x,)), (ops.split_halves, (x,)),
        (ops.rms_norm, normed), (ops.rms_norm_quantize, normed), (ops.rms_norm_halves, normed),
        (ops.silu_mul, (x,)), (ops.silu_mul_quantize, (x,)), (ops.silu_mul_halves, (x,)),
        (ops.rms_norm_probe_linear, (*normed, weight)), (ops.silu_mul_probe_linear, (x, half)),
    ):  # fmt: skip
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [*SHAPES, (7, 300)])
def test_norm_and_gate_alone(m: int, k: int, dtype: torch.dtype) -> None:
    """What is not quantized: 16 bits, as the graph would have it."""
    x, residual, weight = in_eighths(m, k, dtype), in_eighths(m, k, dtype), norm_weight(k, dtype)
    for given in (None, residual):
        normalized, added = ops.rms_norm(x, weight, 1e-6, given)
        expected, total = reference.rms_norm(x, weight, 1e-6, given)
        assert_same((normalized, added), (expected, total if given is not None else total[:0, 0]))
    gate_up = (torch.randn(m, 2 * k) * 3).to(DEVICE, dtype)
    apart = ops.silu_mul(gate_up) != reference.silu_mul(gate_up)
    assert float(apart.float().mean()) < 1e-3


def warm_up_halves(*arguments: Any) -> None:
    quantizer_ops.warm_up_halves(*arguments, [PROBE_TILE, Tile("halves", 4, 64, 2)])


@pytest.mark.parametrize("warm_up", [quantizer_ops.warm_up_codes, warm_up_halves])
def test_warming_up_runs_every_kernel(
    warm_up: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_activation, "MANY_TOKENS", 3)
    warm_up(256, torch.bfloat16, DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="needs compute capability 9.0")
def test_programmatic_dependent_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    x, weight = ordinary(5, 3584, torch.bfloat16), norm_weight(3584, torch.bfloat16)
    for _ in range(3):
        got = quantize_activation.rms_norm_halves(x, weight, 1e-6, x)
        again = quantize_activation.quantize(got[2])
    with monkeypatch.context() as patched:
        patched.setattr(launch, "early", lambda device: {})
        assert_same(got, quantize_activation.rms_norm_halves(x, weight, 1e-6, x))
        assert_same(again, quantize_activation.quantize(got[2]))
