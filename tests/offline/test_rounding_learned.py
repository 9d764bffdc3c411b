"""Learned rounding on a small nonlinear block."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from qig_serve.formats import SCHEMES
from qig_serve.offline.learned_rounding import LearningOptions, learn_rounding
from qig_serve.offline.rounding import (
    RoundedLinear,
    RoundingOptions,
    StatsAccumulator,
    round_linear,
)
from qig_serve.packing import pack_linear, unpack_linear

QUICK = LearningOptions(steps=40, offset_rate=0.02, check_every=10)


class _Mlp:
    """down(silu(gate x) * up x) with inputs in a few directions; two batches."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(24, 128, generator=generator)
        self.x = torch.randn(2, 96, 24, generator=generator) @ mix / 24**0.5
        self.weights = {
            name: torch.randn(n, k, generator=generator) / k**0.5
            for name, n, k in (("gate", 256, 128), ("up", 256, 128), ("down", 64, 256))
        }
        self.targets = self.run(self.x, self.weights)

    def inner(self, x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)

    def run(self, x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.inner(x, w) @ w["down"].T

    def loss(self, batch: int, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (self.run(self.x[batch], w) - self.targets[batch]).square().mean()

    def total(self, rounded: Mapping[str, RoundedLinear]) -> float:
        w = {name: linear.dequantized() for name, linear in rounded.items()}
        return float(self.loss(0, w) + self.loss(1, w))

    def rounded(self, scheme: str, compensation: str) -> dict[str, RoundedLinear]:
        options = RoundingOptions(
            compensation=compensation,  # type: ignore[arg-type]
            scale_refit=False,
            polish_sweeps=0,
        )
        out = {}
        for name, weight in self.weights.items():
            x = self.inner(self.x, self.weights) if name == "down" else self.x
            stats = StatsAccumulator(weight.shape[1])
            stats.accumulate(x.reshape(-1, weight.shape[1]))
            out[name] = round_linear(
                weight, stats.finish(), SCHEMES[scheme], torch.bfloat16, options, name
            )
        return out


def _learn(
    mlp: _Mlp, start: dict[str, RoundedLinear], scheme: str, options: LearningOptions = QUICK
) -> dict[str, RoundedLinear]:
    return learn_rounding(start, mlp.weights, SCHEMES[scheme], torch.bfloat16, mlp.loss, 2, options)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8", "w2a16"])
def test_lowers_the_loss_of_the_block(scheme: str) -> None:
    mlp = _Mlp()
    start = mlp.rounded(scheme, "none")
    learned = _learn(mlp, start, scheme)
    ratio = mlp.total(learned) / mlp.total(start)
    assert ratio < 0.9
    assert all(abs(r.report["learned"] - ratio) < 1e-3 for r in learned.values())


def test_starts_from_the_codes_of_compensation() -> None:
    """What compensation has won is not lost in the first steps, and a little is added."""
    mlp = _Mlp()
    start = mlp.rounded("w3a16", "gptq")
    slow = LearningOptions(steps=60, offset_rate=0.002, scale_rate=0.001, check_every=10)
    assert mlp.total(_learn(mlp, start, "w3a16", slow)) < 0.98 * mlp.total(start)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_result_can_be_stored(scheme: str) -> None:
    mlp = _Mlp()
    for linear in _learn(mlp, mlp.rounded(scheme, "gptq"), scheme).values():
        tensors = pack_linear(
            linear.codes, linear.scale, linear.zero, SCHEMES[scheme], torch.bfloat16
        )
        assert torch.equal(unpack_linear(tensors, SCHEMES[scheme]), linear.dequantized())


def test_never_worse_than_the_start() -> None:
    """A rate far too high: the start is what comes back."""
    mlp = _Mlp()
    start = mlp.rounded("w4a8", "gptq")
    wild = LearningOptions(steps=4, offset_rate=0.5, scale_rate=0.5, check_every=1)
    learned = _learn(mlp, start, "w4a8", wild)
    assert mlp.total(learned) <= mlp.total(start)


def test_no_steps_change_nothing() -> None:
    mlp = _Mlp()
    start = mlp.rounded("w3a16", "gptq")
    for name, linear in _learn(mlp, start, "w3a16", LearningOptions(steps=0)).items():
        assert torch.equal(linear.codes, start[name].codes)
        assert torch.equal(linear.scale, start[name].scale)


def test_same_input_same_bytes() -> None:
    mlp = _Mlp()
    start = mlp.rounded("w3a16", "none")
    first, again = _learn(mlp, start, "w3a16"), _learn(mlp, start, "w3a16")
    assert all(torch.equal(first[n].codes, again[n].codes) for n in first)
