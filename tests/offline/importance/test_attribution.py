"""Integrated gradients: completeness, the straight-through estimator, masks, quartile clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qig_serve.formats import get_scheme
from qig_serve.offline.importance.attribution import (
    clip_outliers,
    completeness,
    integrate,
    normalize,
    quadrature,
)
from qig_serve.offline.passes.capture import quantize_activation_ste
from qig_serve.packing import fake_quantize


class Mlp(nn.Module):
    """A gated MLP; `quantized` replaces its weights and, if asked, quantizes its inputs."""

    def __init__(self, scheme: str, activations: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = [torch.randn(n, k) / k**0.5 for n, k in ((256, 128), (256, 128), (128, 256))]
        self.full_weights = make
        self.quantized_weights = [fake_quantize(w, get_scheme(scheme)) for w in make]
        self.activations = activations

    @staticmethod
    def _run(x: torch.Tensor, weights: list[torch.Tensor], act: bool) -> torch.Tensor:
        def q(z: torch.Tensor) -> torch.Tensor:
            return quantize_activation_ste(z) if act else z

        gate, up, down = weights
        h = nn.functional.silu(q(x) @ gate.T) * (q(x) @ up.T)
        return q(h) @ down.T

    def full(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, self.full_weights, False)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, self.quantized_weights, self.activations)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 128, generator=generator)
    x[:, 3] *= 20  # a massive token
    return x


def everything(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(("rule", "steps"), [("gauss", 4), ("gauss", 8), ("uniform", 32)])
def test_quadrature_integrates_the_unit_interval(rule: str, steps: int) -> None:
    q = quadrature(rule, steps)
    assert sum(q.weights) == pytest.approx(1)
    assert all(0 < node <= 1 for node in q.nodes)
    square = sum(w * n**2 for n, w in zip(q.nodes, q.weights, strict=True))
    assert square == pytest.approx(1 / 3, rel=0.05)
    if rule == "gauss":
        assert square == pytest.approx(1 / 3, rel=1e-9)


@pytest.mark.parametrize(("rule", "steps"), [("gauss", 4), ("uniform", 128)])
def test_completeness_weight_only(x: torch.Tensor, rule: str, steps: int) -> None:
    mlp = Mlp("w3a16", False)
    a = integrate(
        mlp.full, mlp.quantized, x, torch.zeros_like(x), everything(x), quadrature(rule, steps)
    )
    assert float(a.difference.min()) > 0
    for integral, difference in zip(a.integral, a.difference, strict=True):
        assert completeness(float(integral), float(difference)) < 0.02


def test_one_node_is_exact_for_a_linear(x: torch.Tensor) -> None:
    w = torch.randn(64, 128)
    q = fake_quantize(w, get_scheme("w3a16"))
    arguments = (lambda z: z @ w.T, lambda z: z @ q.T, x, torch.zeros_like(x), everything(x))
    one = integrate(*arguments, quadrature("gauss", 1))
    many = integrate(*arguments, quadrature("uniform", 64))
    torch.testing.assert_close(one.importance, many.importance, rtol=1e-3, atol=1e-5)


def test_quantized_branch_has_a_gradient(x: torch.Tensor) -> None:
    """With w_q under no_grad, or rounding without an estimator, only f(., w) would have one."""
    mlp = Mlp("w4a8", True)
    x0 = torch.zeros_like(x)
    rule = quadrature("gauss", 4)
    right = integrate(mlp.full, mlp.quantized, x, x0, everything(x), rule)

    def constant(z: torch.Tensor) -> torch.Tensor:
        return mlp.quantized(z).detach()

    wrong = integrate(mlp.full, constant, x, x0, everything(x), rule)
    d = float(right.difference.sum())
    assert completeness(float(right.integral.sum()), d) < 0.1
    assert completeness(float(wrong.integral.sum()), d) > 0.4


def test_straight_through_estimator() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    out = quantize_activation_ste(x)
    assert not torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_padding_has_no_say(x: torch.Tensor) -> None:
    mlp = Mlp("w3a16", False)
    mask = everything(x)
    mask[0, 20:] = False
    rule = quadrature("gauss", 4)
    clean = integrate(mlp.full, mlp.quantized, x, torch.zeros_like(x), mask, rule)
    dirty_x = x.clone()
    dirty_x[0, 20:] = 1e3
    dirty = integrate(mlp.full, mlp.quantized, dirty_x, torch.zeros_like(x), mask, rule)
    assert float(clean.importance[0, 20:].abs().max()) == 0
    torch.testing.assert_close(clean.importance, dirty.importance)
    torch.testing.assert_close(clean.difference, dirty.difference)


def test_no_overflow_in_half_precision_outputs() -> None:
    """Discrepancies are taken in fp32: scaling them by 1000 in fp16, as released, overflows."""
    w = torch.randn(64, 128) * 100
    q = fake_quantize(w, get_scheme("w3a16"))
    x = torch.randn(1, 8, 128) * 10
    a = integrate(
        lambda z: (z @ w.T).half(),
        lambda z: (z @ q.T).half(),
        x,
        torch.zeros_like(x),
        everything(x),
        quadrature("gauss", 2),
    )
    assert torch.isfinite(a.importance).all()
    assert float(a.importance.min()) > 0


def test_clipping_is_applied_and_ignores_masked_tokens() -> None:
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 1000.0, 7777.0, 7777.0]])
    mask = torch.tensor([[True] * 6 + [False] * 2])
    clipped = clip_outliers(u, mask)
    q1, q3 = torch.quantile(u[0, :6], 0.25), torch.quantile(u[0, :6], 0.75)
    assert float(clipped[0, 5]) == pytest.approx(float(q3 + 1.5 * (q3 - q1)))
    assert clipped[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert clipped[0, 6:].tolist() == [0, 0]


def test_quartiles_are_a_samples_own() -> None:
    u = torch.stack([torch.arange(8.0), 100 * torch.arange(8.0)])
    both = clip_outliers(u, torch.ones(2, 8, dtype=torch.bool))
    assert torch.equal(both[1:], clip_outliers(u[1:], torch.ones(1, 8, dtype=torch.bool)))
    assert torch.equal(both, u)


def test_weights_sum_to_one_a_sample_and_fallbacks_are_counted() -> None:
    u = torch.tensor([[1.0, 3.0, 9.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]])
    mask = torch.tensor([[True, True, False]] * 3)
    weights, without = normalize(u, mask)
    assert without == 2
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    assert weights[0].tolist() == [0.25, 0.75, 0]
    assert weights[1].tolist() == [0.5, 0.5, 0]


def test_no_state_between_runs(x: torch.Tensor) -> None:
    """The first call and the tenth give the same weights: nothing counts calls."""
    mlp = Mlp("w3a16", False)
    arguments = (mlp.full, mlp.quantized, x, torch.zeros_like(x), everything(x))
    runs = [integrate(*arguments, quadrature("gauss", 3)).importance for _ in range(8)]
    assert all(torch.equal(runs[0], r) for r in runs)
    assert float(runs[0].std()) > 0
