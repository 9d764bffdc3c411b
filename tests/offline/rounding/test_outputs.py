"""Rows make up for each other where outputs are known to."""

from __future__ import annotations

import pytest
import torch

from qig_serve.formats import SCHEMES, get_scheme
from qig_serve.offline.passes.hessian import LinearStats, StatsAccumulator
from qig_serve.offline.recipe import ROUNDINGS
from qig_serve.offline.rounding.linear import round_linear
from qig_serve.offline.rounding.rounded import RoundedLinear

K, N = 128, 96


def statistics(x: torch.Tensor) -> LinearStats:
    """Of inputs [T, K], the same in full precision, in two halves."""
    accumulator = StatsAccumulator(K, shifted=True)
    for half, part in enumerate(x.chunk(2)):
        accumulator.accumulate(part, part, half=half)
    return accumulator.finish()


def cost(rounded: RoundedLinear, hessian: torch.Tensor, outputs: torch.Tensor) -> float:
    """tr(F E H E^T)."""
    assert rounded.target is not None
    error = rounded.target - rounded.dequantized()
    return float(((error @ hessian) * (outputs @ error)).sum())


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.servable])
def test_what_outputs_cost_is_lowered(scheme: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(N, K), torch.randn(2048, K) @ torch.randn(K, K)
    few = torch.randn(N, 12)  # directions of the outputs that matter
    outputs = few @ few.T + 0.05 * torch.eye(N)
    outputs /= outputs.diagonal().mean()
    stats, method = statistics(x), ROUNDINGS["qronos-outputs"]
    found = [
        round_linear(weight, stats, get_scheme(scheme), torch.float32, method, outputs=given)
        for given in (None, (outputs / 2, outputs / 2))
    ]
    plain, better = (cost(rounded, stats.hessian, outputs) for rounded in found)
    assert better < 0.5 * plain
    assert found[1].report.outputs_held_out < 0.5 and found[1].report.outputs_damping == 0.1
    each = torch.eye(N) / 2
    again = round_linear(
        weight, stats, get_scheme(scheme), torch.float32, method, outputs=(each, each)
    )
    assert torch.equal(again.codes, found[0].codes)  # no output's error makes up for another's


def test_what_does_not_hold_on_samples_left_out_is_left() -> None:
    """Gradients of few tokens, which are noise: the rows are rounded each for itself."""
    torch.manual_seed(0)
    weight, x = torch.randn(N, K), torch.randn(512, K)
    stats, method, scheme = statistics(x), ROUNDINGS["qronos-outputs"], get_scheme("w3a16")
    gradients = torch.randn(2, 40, N)
    first, second = gradients.transpose(1, 2) @ gradients
    found = [
        round_linear(weight, stats, scheme, torch.float32, method, outputs=given)
        for given in (None, (first, second), (first + second, first + second))
    ]
    assert torch.equal(found[1].codes, found[0].codes)
    assert found[1].report.outputs_held_out >= 1 > found[2].report.outputs_held_out


def test_outputs_that_nothing_depends_on() -> None:
    """F of zeros, as of a block behind which no answer stands: rounded as without."""
    torch.manual_seed(0)
    weight, x = torch.randn(N, K), torch.randn(512, K)
    stats, method, scheme = statistics(x), ROUNDINGS["qronos-outputs"], get_scheme("w3a16")
    found = [
        round_linear(weight, stats, scheme, torch.float32, method, outputs=given)
        for given in (None, (torch.zeros(N, N), torch.zeros(N, N)))
    ]
    assert torch.equal(found[0].codes, found[1].codes)
