"""GPTQ's columns as the quantizer rounds them on a GPU: collected like kernel_checks.py."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, poisoned  # noqa: F401 - a fixture

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels.round_columns import round_columns


def block(
    scheme_name: str, n: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Columns of a weight [C, N], their scales and zero points, and a factor [C, C]."""
    generator = torch.Generator().manual_seed(n + columns)
    scheme = SCHEMES[scheme_name]
    weight = torch.randn(n, columns, generator=generator)
    scale, zero = packing.minmax_params(weight * 0.7, scheme, torch.float32)  # some are cut off
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x += 2 * x.roll(1, 1)  # neighbours are alike
    upper = torch.linalg.cholesky((x.T @ x / len(x)).inverse(), upper=True).float()

    def spread(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups.float().expand(n, columns).T.contiguous().to(DEVICE)

    zeros = None if zero is None else spread(zero)
    return weight.T.contiguous().to(DEVICE), spread(scale), zeros, upper.to(DEVICE)


def rounded(
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    upper: torch.Tensor,
    ends: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's algorithm 1 in fp64: codes and errors."""
    left, u, scales = w.double(), upper.double(), scales.double()
    zero = torch.zeros_like(scales) if zeros is None else zeros.double()
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for i in range(len(left)):
        codes[i] = ((left[i] / scales[i]).round() + zero[i]).clamp(*ends)
        errors[i] = (left[i] - (codes[i] - zero[i]) * scales[i]) / u[i, i]
        left[i + 1 :] -= u[i, i + 1 :, None] * errors[i]
    return codes, errors


@pytest.mark.parametrize(("n", "columns"), [(1, 128), (21, 128), (19, 37)])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_columns_are_rounded_as_in_fp64(scheme: str, n: int, columns: int) -> None:
    w, scales, zeros, upper = block(scheme, n, columns)
    ends = SCHEMES[scheme].qmin, SCHEMES[scheme].qmax
    dtype = torch.uint8 if zeros is not None else torch.int8
    wanted = rounded(w, scales, zeros, upper, ends)
    codes, errors = round_columns(w, scales, zeros, upper, ends, dtype)
    assert codes.dtype == dtype and int(codes.min()) >= ends[0] and int(codes.max()) <= ends[1]
    # Rarely a value falls on the other side of a half, and then also those behind it in its row.
    equal = (codes == wanted[0]).all(0)
    assert float(equal.float().mean()) > 0.9
    exact = wanted[1][:, equal].float()
    torch.testing.assert_close(errors[:, equal], exact, rtol=1e-3, atol=1e-4)


def test_a_whole_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of columns, the last a shorter one, in the factor's order."""
    pytest.importorskip("pydantic")  # which a GPU machine may have none of
    from qig_serve.offline.passes.hessian import factorize
    from qig_serve.offline.recipe import Damping
    from qig_serve.offline.rounding import columns, gptq

    generator = torch.Generator().manual_seed(0)
    n, k = 24, 320
    weight = torch.randn(n, k, generator=generator).to(DEVICE)
    x = torch.randn(500, k, generator=generator) * torch.rand(k, generator=generator)
    x = x.to(DEVICE)
    scheme = SCHEMES["w3a16"]
    factor = factorize(x.T @ x / 500, Damping(fraction=0.01))
    scale, zero = packing.minmax_params(weight, scheme, torch.bfloat16)
    monkeypatch.setattr(gptq, "column_rounding", lambda _: columns.in_torch)
    wanted = gptq.compensated_codes(weight, factor, scheme, scale, zero)
    monkeypatch.setattr(gptq, "column_rounding", lambda _: round_columns)
    got = gptq.compensated_codes(weight, factor, scheme, scale, zero)
    assert float((got == wanted).float().mean()) > 0.98

    def cost(codes: torch.Tensor) -> float:
        error = (packing.dequantize(codes, scale, zero) - weight) @ x.T
        return float(error.square().sum())

    assert cost(got) < 1.01 * cost(wanted)


def test_what_a_gpu_is_asked_first() -> None:
    pytest.importorskip("pydantic")
    from qig_serve.offline.rounding import columns

    assert columns.share_of_rows_that_differ(round_columns, torch.device(DEVICE)) < 0.02
