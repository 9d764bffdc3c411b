"""Sums of products over tokens: right on both kinds of device, and no setting left behind."""

from __future__ import annotations

import pytest
import torch

from qig_serve.offline.passes.hessian import add_products


def _check(device: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(500, 96, generator=generator).to(device)
    right = torch.randn(500, 64, generator=generator).to(device)
    total = torch.ones(96, 64, device=device)
    add_products(total, left, right)
    exact = 1 + left.double().T @ right.double()
    size = left.double().square().sum(0).sqrt()[:, None] * right.double().square().sum(0).sqrt()
    assert float(((total - exact) / size).abs().max()) < tolerance
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_are_added() -> None:
    _check("cpu", 1e-6)


def test_a_wide_square_is_symmetric() -> None:
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(1100, 1100)
    for _ in range(2):
        add_products(total, x, x)
    torch.testing.assert_close(total, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    assert torch.equal(total, total.T)


@pytest.mark.gpu
def test_products_are_added_on_tensor_cores() -> None:
    _check("cuda", 1e-3)
    # Of bf16 inputs each product is exact.
    x = torch.randn(300, 128, device="cuda").bfloat16().float()
    total = torch.zeros(128, 128, device="cuda")
    add_products(total, x, x)
    assert float((total - x.double().T @ x.double()).abs().max()) < 1e-3


class _OnGpu(torch.Tensor):
    """Takes itself for one on a GPU."""

    is_cuda = True


def test_a_failure_leaves_the_precision_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = torch.set_float32_matmul_precision
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda name: (asked.append(name), choose(name))
    )
    with pytest.raises(RuntimeError):
        add_products(torch.zeros(2, 2).as_subclass(_OnGpu), torch.zeros(3, 4), torch.zeros(3, 2))
    assert asked == ["high", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"
