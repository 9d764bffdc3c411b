"""The target shift keeps what holds on samples left out, and ranges suit compensation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qig_serve.formats import get_scheme
from qig_serve.offline.passes.hessian import StatsAccumulator, validated_damping
from qig_serve.offline.recipe import ROUNDINGS, Damping
from qig_serve.offline.rounding.linear import round_linear
from qig_serve.offline.rounding.qronos import validated_target

K, N = 128, 32


def statistics(x_q: torch.Tensor, x_fp: torch.Tensor, batches: int = 8) -> StatsAccumulator:
    accumulator = StatsAccumulator(K, shifted=True)
    for i, (q, fp) in enumerate(zip(x_q.chunk(batches), x_fp.chunk(batches), strict=True)):
        accumulator.accumulate(q, fp, half=i % 2)
    return accumulator


def test_a_drift_that_the_inputs_show_is_made_up_for() -> None:
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


def test_noise_that_few_samples_seem_to_show_is_left_alone() -> None:
    torch.manual_seed(1)
    weight = torch.randn(N, K)
    x_q, fresh = torch.randn(192, K), torch.randn(2000, K)
    stats = statistics(x_q, x_q + torch.randn_like(x_q)).finish()
    target, chosen = validated_target(weight, stats.halves)
    # The shift as it is without validation, nearly undamped.
    cross = stats.halves[0][1] + stats.halves[1][1]
    damped = stats.hessian + 0.01 * torch.diag(stats.hessian.diagonal())
    full = weight + torch.linalg.solve(damped, (weight @ cross).T).T

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
    plain = StatsAccumulator(K)
    plain.accumulate(x_q)
    torch.testing.assert_close(stats.hessian, plain.finish().hessian)
    torch.testing.assert_close(stats.halves[0][0] + stats.halves[1][0], stats.hessian)
    cross = (x_fp - x_q).T @ x_q / len(x_q)
    torch.testing.assert_close(stats.halves[0][1] + stats.halves[1][1], cross)


def test_rounding_reports_what_was_chosen() -> None:
    torch.manual_seed(3)
    x_q = torch.randn(1024, K)
    stats = statistics(x_q, 1.1 * x_q).finish()
    report = round_linear(
        torch.randn(N, K), stats, get_scheme("w3a16"), torch.float32, ROUNDINGS["qronos"]
    ).report
    assert report.shift is not None and report.shift > 0.9 and report.shift_damp == 0.03
    with pytest.raises(ValueError, match="x_fp is needed"):
        StatsAccumulator(K, shifted=True).accumulate(x_q)


def held_out(tokens: int, validated: bool) -> tuple[float, float]:
    """Damping, and the output error on tokens left out over that of round-to-nearest."""
    torch.manual_seed(6)
    mixing = torch.eye(K) + 0.5 * torch.randn(K, K) / K**0.5
    x, fresh = (torch.randn(n, K) @ mixing for n in (tokens, 4096))
    weight, scheme, stats = torch.randn(N, K), get_scheme("w3a16"), statistics(x, x).finish()
    method = replace(ROUNDINGS["qronos"], damping=Damping(validated=validated))
    rounded = round_linear(weight, stats, scheme, torch.float32, method)
    nearest = round_linear(weight, stats, scheme, torch.float32, ROUNDINGS["nearest"])
    errors = [(fresh @ (r.dequantized() - weight).T).square().mean() for r in (rounded, nearest)]
    assert rounded.report.damping is not None
    return rounded.report.damping, float(errors[0] / errors[1])


def test_damping_suits_tokens_left_out() -> None:
    """Of few tokens compensation believes little, of many all."""
    (many, _), (few, error), (_, fitted) = (
        held_out(*case) for case in ((8192, True), (160, True), (160, False))
    )
    assert many < 0.02 and few >= 0.1
    assert error < 0.85 * fitted


def test_damping_of_inputs_that_a_half_never_sees() -> None:
    x = torch.randn(64, K)
    x[:, :3] = 0
    x[32:, 3:6] = 0
    stats = statistics(x, x, batches=2).finish()
    weight, scheme = torch.randn(N, K), get_scheme("w4a8")
    report = round_linear(weight, stats, scheme, torch.float32, ROUNDINGS["qronos"]).report
    assert report.damping is not None and report.damping > 0.01 and not report.damping_raised
    x = torch.zeros(64, K)
    stats = statistics(x, x, batches=2).finish()
    assert validated_damping([h for h, _ in stats.halves], 0.01).fraction == 0.01


def test_outputs_of_changed_inputs_are_met_better() -> None:
    """What full-precision inputs give, from the inputs that are there."""
    torch.manual_seed(4)
    x_fp = torch.randn(2048, K) @ torch.randn(K, K)
    x_q = x_fp @ (torch.eye(K) + 0.02 * torch.randn(K, K))
    w, stats, errors = torch.randn(N, K), statistics(x_q, x_fp).finish(), {}
    for kind in ("gptq", "qronos"):
        scheme, method = get_scheme("w3a16"), ROUNDINGS[kind]
        q = round_linear(w, stats, scheme, torch.float32, method).dequantized()
        errors[kind] = float((x_fp @ w.T - x_q @ q.T).square().mean())
    assert errors["qronos"] < 0.95 * errors["gptq"]


@pytest.mark.parametrize(("name", "most"), [("w3a16", 0.85), ("w4a8", 0.85)])
def test_ranges_are_those_that_compensation_wants(name: str, most: float) -> None:
    """Of weights with tails, towards the same target: GPTQ's are the groups' extremes."""
    torch.manual_seed(5)
    x = torch.randn(2048, K) @ (torch.eye(K) + 0.5 * torch.randn(K, K) / K**0.5)
    weight = torch.distributions.StudentT(4.0).sample((N, K))
    stats, scheme = statistics(x, x).finish(), get_scheme(name)
    error = {
        kind: round_linear(weight, stats, scheme, torch.float32, ROUNDINGS[kind]).report.error
        for kind in ("gptq", "qronos")
    }
    assert error["qronos"] < most * error["gptq"]
