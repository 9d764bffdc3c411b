"""The noise model of equalization: its gradient, what it finds, and that processes agree."""

from __future__ import annotations

import pytest
import torch

from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.offline.equalization import channel_scales
from qig_serve.offline.equalization.channel_scales import (
    Noise,
    TokenMoments,
    error_cost,
    token_moments,
)
from qig_serve.offline.recipe import Damping
from qig_serve.packing import fake_quantize, fake_quantize_activation

K, N, T = 256, 64, 500
DAMPING = Damping()


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [N, K], tokens [T, K] with outliers in random channels, lambda [T]."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(K, generator=g))
    weight = torch.randn(N, K, generator=g) / torch.exp(0.5 * torch.randn(K, generator=g))
    return weight, torch.randn(T, K, generator=g) * sizes, torch.rand(T, generator=g) / T


def noise(
    weight: torch.Tensor, moments: TokenMoments, scheme: QuantScheme, logs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E and its gradient in log s."""
    return Noise([weight], moments, scheme, torch.arange(K)).at(logs.exp(), moments.energy)


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_gradient_is_that_of_the_noise(name: str) -> None:
    weight, x, weights = case()
    scheme = SCHEMES[name]
    moments = token_moments([(x, weights)], T, scheme.activation_bits is not None)
    logs = 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(1))
    _, gradient = noise(weight.double(), _double(moments), scheme, logs.double())
    for channel in range(0, K, 17):
        nudge = torch.zeros(K, dtype=torch.float64)
        nudge[channel] = 1e-6
        up, _ = noise(weight.double(), _double(moments), scheme, logs.double() + nudge)
        down, _ = noise(weight.double(), _double(moments), scheme, logs.double() - nudge)
        assert float(gradient[channel]) == pytest.approx(float((up - down) / 2e-6), rel=1e-3)


def _double(moments: TokenMoments) -> TokenMoments:
    return TokenMoments(moments.energy.double(), moments.sizes.double(), moments.weights.double())


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_the_model_predicts_the_error_and_lowers_it(name: str) -> None:
    weight, x, weights = case()
    scheme = SCHEMES[name]
    quantizes = scheme.activation_bits is not None
    moments = token_moments([(x, weights)], T, quantizes)

    def error(scales: torch.Tensor) -> float:
        scaled = x / scales
        rounded = fake_quantize_activation(scaled) if quantizes else scaled
        out = rounded @ fake_quantize(weight * scales, scheme).T - x @ weight.T
        return float((weights[:, None] * out.square()).sum())

    plain = torch.ones(K)
    found = Noise([weight[:40], weight[40:]], moments, scheme, torch.arange(K)).minimize(plain)
    expected = float(noise(weight, moments, scheme, plain.log())[0]) / 12
    assert expected == pytest.approx(error(plain), rel=0.25)
    curve = min(error(x.abs().mean(0) ** (r / 20)) for r in range(20))
    assert error(found) < 0.9 * curve < error(plain)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_it_starts_where_the_noise_is_least(name: str) -> None:
    weight, x, weights = case()
    moments = token_moments([(x, weights)], T, name == "w4a8")
    group = Noise([weight], moments, SCHEMES[name], torch.arange(K))
    curve = [x.abs().mean(0) ** (r / 20) for r in range(20)]
    values = [float(noise(weight, moments, SCHEMES[name], s.log())[0]) for s in curve]
    assert group.quietest(curve) == values.index(min(values)) not in (0, 19)


def test_heads_that_share_a_channel_get_one_scale() -> None:
    weight, x, weights = case()
    shared = torch.arange(K) // 128 * 64 + torch.arange(K) % 64  # two query heads a kv head
    moments = token_moments([(x, weights)], T, True)
    found = Noise([weight], moments, SCHEMES["w4a8"], shared).minimize(torch.ones(K // 2))
    assert found.shape == (K // 2,) and float(found.std()) > 0.1


def test_tokens_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them count in the energy, and those kept stand for the others."""
    _, x, weights = case()
    monkeypatch.setattr(channel_scales, "MAX_TOKENS", 100)
    parts = [(x[:137], weights[:137]), (x[137:], weights[137:])]
    moments = token_moments(parts, T, True)
    assert torch.equal(moments.sizes, x[::5].abs())
    torch.testing.assert_close(moments.energy, weights @ x.square())
    torch.testing.assert_close(moments.weights.sum(), weights.sum())
    assert not len(token_moments(parts, T, False).sizes)


def test_with_compensation_an_error_costs_what_others_cannot_make_up_for() -> None:
    """A pair of channels that always move together costs little; scaling inputs changes nothing."""
    weight, x, weights = case()
    x[:, 1] = x[:, 0] * 2
    parts = [(x[:137], weights[:137]), (x[137:], weights[137:])]
    moments = token_moments(parts, T, False, compensates=True)
    assert moments.hessian is not None
    torch.testing.assert_close(moments.hessian.diagonal(), moments.energy)
    cost = error_cost(moments, torch.ones(K), DAMPING)
    assert bool((cost[:2] < 0.15 * moments.energy[:2]).any())
    assert bool((cost <= 1.02 * moments.energy).all())
    halved = token_moments([(a / 2, b) for a, b in parts], T, False, compensates=True)
    same = error_cost(halved, torch.full((K,), 0.5), DAMPING)
    torch.testing.assert_close(4 * same, cost, rtol=1e-3, atol=0)
    group = Noise([weight], moments, SCHEMES["w3a16"], torch.arange(K), DAMPING)
    found = group.minimize(torch.ones(K))
    assert bool(found.isfinite().all())
