"""The CPU kernels against packing.py's arithmetic on the checkpoint's own tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qig_serve import packing
from qig_serve.formats import SCHEMES, get_scheme
from qig_serve.kernels import cpu, cpu_w3a16, cpu_w4a8, cpu_w8a16

BF16_NOISE = 4e-3  # one rounding of weights or outputs to 8 bits of mantissa


def make(name: str, n: int, k: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A checkpoint's tensors with every code and zero point in use, and the weight they mean."""
    scheme = get_scheme(name)
    g = torch.Generator().manual_seed(seed)
    groups = scheme.num_groups(k)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (n, k), generator=g)
    codes = codes.to(torch.int8 if scheme.symmetric else torch.uint8)
    scale = (torch.rand(n, groups, generator=g) + 0.5) / 64
    zero = None if scheme.symmetric else torch.randint(0, 8, (n, groups), generator=g).byte()
    tensors = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
    return tensors, packing.unpack_linear(tensors, scheme)


def expected(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in fp64, activations quantized if the scheme says so."""
    if name == "w4a8":
        codes, scale = packing.quantize_activation(x)
        return codes.double() * scale.double() @ weight.double().t()
    return x.double() @ weight.double().t()


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "n,k", [(192, 256), (96, 384), (72, 128), (320, 1280), (96, 576), (72, 96)]
)
@pytest.mark.parametrize("name", ["w3a16", "w4a8", "w8a16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    tensors, weight = make(name, n, k)
    bias = torch.linspace(-1, 1, n).to(dtype)
    scheme = get_scheme(name)
    prepared = cpu.prepare(scheme, tensors, dtype)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: BF16_NOISE}[dtype]
    for rows in (1, 3, 4, 5, 47, 64, 130):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        out = cpu.linear(scheme, x, prepared, n, k, None)
        wanted = expected(name, x, weight)
        assert out.dtype == dtype and out.shape == (rows, n)
        assert relative_error(out, wanted) < tolerance, rows
        with_bias = cpu.linear(scheme, x, prepared, n, k, bias)
        assert relative_error(with_bias, wanted + bias.double()) < tolerance, rows


def test_tiles_need_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than one scratch holds, and a last scratch that is not full."""
    monkeypatch.setattr(cpu_w3a16, "SCRATCH", 3 * 64 * 256)
    monkeypatch.setattr(cpu_w4a8, "SCRATCH", 3 * 32 * 256)
    for name in ("w3a16", "w4a8"):
        tensors, weight = make(name, 320, 256)
        x = torch.randn(100, 256).bfloat16()
        prepared = cpu.prepare(get_scheme(name), tensors, torch.bfloat16)
        bias = torch.randn(320).bfloat16()
        out = cpu.linear(get_scheme(name), x, prepared, 320, 256, bias)
        assert relative_error(out, expected(name, x, weight) + bias.double()) < BF16_NOISE


def test_three_dimensional_input() -> None:
    tensors, weight = make("w3a16", 64, 128)
    x = torch.randn(2, 5, 128).bfloat16()
    scheme = get_scheme("w3a16")
    out = cpu.linear(scheme, x, cpu.prepare(scheme, tensors, x.dtype), 64, 128, None)
    assert out.shape == (2, 5, 64)
    assert relative_error(out, expected("w3a16", x, weight)) < BF16_NOISE


@pytest.mark.parametrize("rows", [1, 200])
def test_w4a8_outlier_token_and_zero_token(rows: int) -> None:
    """A huge channel costs the token's resolution as the format says, and zeros stay zeros."""
    tensors, weight = make("w4a8", 64, 256)
    x = torch.randn(rows, 256).bfloat16()
    x[0, 7] = 3e4
    scheme = get_scheme("w4a8")
    prepared = cpu.prepare(scheme, tensors, torch.bfloat16)
    out = cpu.linear(scheme, x, prepared, 64, 256, None)
    assert relative_error(out[:1], expected("w4a8", x[:1], weight)) < BF16_NOISE
    assert torch.equal(
        cpu.linear(scheme, torch.zeros_like(x), prepared, 64, 256, None), torch.zeros(rows, 64)
    )


def test_w4a8_integer_product_is_exact() -> None:
    """Largest codes over a wide K, in fp32: sums beyond 2**24 lose nothing."""
    scheme, k = get_scheme("w4a8"), 16640
    codes = torch.full((32, k), -8, dtype=torch.int8)
    tensors = packing.pack_linear(codes, torch.ones(32, 1), None, scheme, torch.float32)
    x = torch.full((2, k), 127.0)
    x[1, ::2] = 126.0
    out = cpu.linear(scheme, x, cpu.prepare(scheme, tensors, torch.float32), 32, k, None)
    exact = (x.double() @ codes.double().t()).float()
    assert torch.equal(out, exact)


@pytest.mark.parametrize("name,bits", [("w3a16", 4.5), ("w4a8", 4.5), ("w8a16", 8.2)])
def test_bits_held(name: str, bits: float) -> None:
    """No 16-bit copy, and no second copy, stays behind."""
    if name == "w4a8" and not cpu_w4a8.vllm_kernels():
        bits = 8.2
    tensors, _ = make(name, 512, 512)
    prepared = cpu.prepare(get_scheme(name), tensors, torch.bfloat16)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in prepared.values()}
    assert sum(s.nbytes() for s in storages.values()) * 8 / 512**2 < bits


def test_without_vllm_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512 VNNI takes torch's kernels, and a strange layout the GEMM."""
    monkeypatch.setattr(cpu_w4a8, "vllm_kernels", lambda: False)
    monkeypatch.setattr(cpu_w3a16, "int4_block", lambda: None)
    for name in ("w3a16", "w4a8"):
        tensors, weight = make(name, 64, 256)
        x = torch.randn(80, 256).bfloat16()
        prepared = cpu.prepare(get_scheme(name), tensors, x.dtype)
        out = cpu.linear(get_scheme(name), x, prepared, 64, 256, None)
        assert relative_error(out, expected(name, x, weight)) < BF16_NOISE


def test_refusals() -> None:
    w3, w4 = get_scheme("w3a16"), get_scheme("w4a8")
    assert cpu.can_implement(w3, 64, 128, torch.bfloat16) == (True, "")
    assert "32 divides" in cpu.can_implement(w3, 64, 200, torch.bfloat16)[1]
    assert "float64" in cpu.can_implement(w4, 64, 128, torch.float64)[1]
    assert "w2a16" in cpu.can_implement(SCHEMES["w2a16"], 64, 128, torch.bfloat16)[1]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_w8a16_with_and_without_instructions_for_bf16(
    rows: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows of x, and more rows of the table than one scratch holds."""
    monkeypatch.setattr(cpu_w8a16, "multiplies_bf16", lambda: native)
    monkeypatch.setattr(cpu_w8a16, "_SCRATCH", 3 * 256)
    tensors, weight = make("w8a16", 77, 256)
    scheme, x = get_scheme("w8a16"), torch.randn(rows, 256).bfloat16()
    prepared = cpu.prepare(scheme, tensors, torch.bfloat16)
    out = cpu.linear(scheme, x, prepared, 77, 256, None)
    assert relative_error(out, expected("w8a16", x, weight)) < BF16_NOISE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_are_the_dequantized_ones(dtype: torch.dtype) -> None:
    tensors, weight = make("w8a16", 77, 256)
    scheme = get_scheme("w8a16")
    prepared = cpu.prepare(scheme, tensors, dtype)
    ids = torch.tensor([[0, 76], [3, 3]])
    rows = cpu.embedding(scheme, ids, prepared, 77, 256, dtype)
    assert torch.equal(rows, weight[ids].to(dtype))


@pytest.mark.parametrize("name", ["w3a16", "w4a8", "w8a16"])
def test_fake_implementation(name: str) -> None:
    """Shapes are known without running, as torch.compile wants."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, _ = make(name, 64, 128)
    scheme = get_scheme(name)
    prepared = cpu.prepare(scheme, tensors, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(6, 128).bfloat16())
        fake = {key: mode.from_tensor(t) for key, t in prepared.items()}
        out = cpu.linear(scheme, x, fake, 64, 128, None)
    assert out.shape == (6, 64) and out.dtype == torch.bfloat16


def test_reference_equals_dequantized_weight() -> None:
    """The fp32 path is F.linear on packing's own dequantized weight, to the last bit."""
    tensors, weight = make("w3a16", 64, 256)
    scheme = get_scheme("w3a16")
    x = torch.randn(9, 256)
    out = cpu.linear(scheme, x, cpu.prepare(scheme, tensors, torch.float32), 64, 256, None)
    assert torch.equal(out, F.linear(x, weight))
