"""Cross-validation of the target shift: it keeps what holds on samples left out."""

from __future__ import annotations

import pytest
import torch

from qig_serve.errors import UserError
from qig_serve.formats import get_scheme
from qig_serve.offline.compensation import factorize, shifted_target, validated_target
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.rounding import RoundingOptions, StatsAccumulator, round_linear

K, N = 128, 32


def statistics(x_q: torch.Tensor, x_fp: torch.Tensor, batches: int = 8) -> StatsAccumulator:
    accumulator = StatsAccumulator(K, cross=True, halves=True)
    for q, fp in zip(x_q.chunk(batches), x_fp.chunk(batches), strict=True):
        accumulator.accumulate(q, fp)
    return accumulator


def test_a_drift_that_the_inputs_tell_is_made_up_for() -> None:
    torch.manual_seed(0)
    x_q = torch.randn(4096, K)
    mixing = torch.eye(K) + 0.1 * torch.randn(K, K) / K**0.5
    weight = torch.randn(N, K)
    stats = statistics(x_q, x_q @ mixing).finish()
    target, chosen = validated_target(weight, stats.halves)
    assert chosen.strength > 0.9 and chosen.damp == 0.03 and chosen.gain > 0
    fresh = torch.randn(1000, K)
    wanted = fresh @ mixing @ weight.T
    before = (wanted - fresh @ weight.T).square().mean()
    after = (wanted - fresh @ target.T).square().mean()
    assert after < 0.02 * before


def test_noise_that_few_samples_seem_to_tell_is_left_alone() -> None:
    torch.manual_seed(1)
    weight = torch.randn(N, K)
    x_q, fresh = torch.randn(192, K), torch.randn(2000, K)
    stats = statistics(x_q, x_q + torch.randn_like(x_q)).finish()
    assert stats.cross is not None
    target, chosen = validated_target(weight, stats.halves)
    full = shifted_target(weight, stats.cross, factorize(stats.hessian, 0.01, True, True), False)

    def harm(changed: torch.Tensor) -> float:
        return float((fresh @ (changed - weight).T).square().mean())

    # What the plain shift fits is nothing but noise: it moves outputs that should stay.
    assert harm(target) < 0.05 * harm(full)
    assert chosen.strength < 0.5 or chosen.damp == 3.0


def test_without_drift_the_weight_stays() -> None:
    x = torch.randn(256, K)
    weight = torch.randn(N, K)
    target, chosen = validated_target(weight, statistics(x, x).finish().halves)
    assert target is weight and chosen.strength == 0


def test_halves_add_up_to_the_whole() -> None:
    torch.manual_seed(2)
    x_q, x_fp = torch.randn(2, 512, K)
    stats = statistics(x_q, x_fp).finish()
    plain = StatsAccumulator(K, cross=True)
    plain.accumulate(x_q, x_fp)
    whole = plain.finish()
    assert stats.cross is not None and whole.cross is not None
    torch.testing.assert_close(stats.hessian, whole.hessian)
    torch.testing.assert_close(stats.cross, whole.cross)
    torch.testing.assert_close(stats.halves[0][0] + stats.halves[1][0], whole.hessian)


def test_rounding_reports_what_was_chosen() -> None:
    torch.manual_seed(3)
    x_q = torch.randn(1024, K)
    stats = statistics(x_q, 1.1 * x_q).finish()
    options = RoundingOptions(validate_shift=True)
    rounded = round_linear(torch.randn(N, K), stats, get_scheme("w3a16"), torch.float32, options)
    assert rounded.report["shift"] > 0.9 and rounded.report["shift_damp"] == 0.03
    plain = StatsAccumulator(K, cross=True)
    plain.accumulate(x_q, x_q)
    with pytest.raises(ValueError, match="halves"):
        round_linear(torch.randn(N, K), plain.finish(), get_scheme("w3a16"), torch.float32, options)


def test_it_is_a_part_of_qronos() -> None:
    with pytest.raises(UserError, match="needs compensation qronos, not gptaq"):
        make_recipe({"method": "awq", "compensation": "gptaq", "validate_shift": True})
