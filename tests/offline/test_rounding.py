"""Range search, GPTQ, GPTAQ, refit: against exact cases, brute force, and each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from qig_serve.errors import UserError
from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.offline import compensation as comp
from qig_serve.offline.rounding import (
    LinearStats,
    RoundingOptions,
    StatsAccumulator,
    round_linear,
)
from qig_serve.packing import dequantize, minmax_params, quantize

SCHEME_NAMES = sorted(SCHEMES)
PLAIN = RoundingOptions(
    range_search="minmax",
    range_rounds=0,
    compensation="none",
    scale_refit=False,
    polish_sweeps=0,
)


def _inputs(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, k // 8, generator=generator)
    mix = torch.randn(k // 8, k, generator=generator)
    x = latent @ mix + 0.3 * torch.randn(tokens, k, generator=generator)
    x[:, :: k // 8] *= 8
    return x


def _weight(n: int, k: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)


def _stats(x: torch.Tensor, x_fp: torch.Tensor | None = None) -> LinearStats:
    accumulator = StatsAccumulator(x.shape[1], cross=x_fp is not None)
    accumulator.accumulate(x, x_fp)
    return accumulator.finish()


def _output_error(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (w - q).T).square().mean())


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_every_step_lowers_the_output_error(name: str) -> None:
    scheme = SCHEMES[name]
    w, x = _weight(24, 256), _inputs(512, 256)
    stats = _stats(x)
    errors = []
    for options in (
        PLAIN,
        ranged := replace(PLAIN, range_search="energy"),
        gptq := replace(ranged, compensation="gptq"),
        rounds := replace(gptq, range_rounds=2),
        refitted := replace(rounds, scale_refit=True),
        replace(refitted, polish_sweeps=1),
    ):
        rounded = round_linear(w, stats, scheme, torch.float32, options)
        errors.append(_output_error(w, rounded.dequantized(), x))
    assert errors[1] < errors[0] and errors[2] < 0.7 * errors[1]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(errors[2:]))
    assert errors[-1] < 0.9 * errors[2]


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_without_correlation_gptq_is_rounding(name: str) -> None:
    scheme = SCHEMES[name]
    w = _weight(5, 256)
    stats = LinearStats(torch.diag(torch.rand(256) + 0.5), None, 1)
    options = replace(PLAIN, compensation="gptq")
    rounded = round_linear(w, stats, scheme, torch.float32, options)
    scale, zero = minmax_params(w, scheme)
    assert torch.equal(rounded.codes, quantize(w, scale, zero, scheme))


def test_close_to_the_optimum_of_a_small_problem() -> None:
    """Against all 4^6 choices of codes: better than rounding, and near the best there is."""
    scheme = QuantScheme("tiny", bits=2, symmetric=False, group_size=6, servable=False)
    gptq_options = replace(PLAIN, compensation="gptq", damp=1e-6, polish_sweeps=3)
    levels = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    ours, optimum, nearest = 0.0, 0.0, 0.0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(1, 6, generator=generator)
        x = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
        stats = _stats(x)
        scale, zero = minmax_params(w, scheme)
        every = dequantize(levels, scale.expand(len(levels), 1), zero.expand(len(levels), 1))
        optimum += float(comp.objective(w - every, stats.hessian).min())
        rounded = round_linear(w, stats, scheme, torch.float32, gptq_options)
        ours += float(comp.objective(w - rounded.dequantized(), stats.hessian))
        rtn = round_linear(w, stats, scheme, torch.float32, PLAIN)
        nearest += float(comp.objective(w - rtn.dequantized(), stats.hessian))
    assert optimum <= ours < 0.7 * nearest
    assert ours < 1.6 * optimum


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_act_order_keeps_the_groups_of_the_layout(name: str) -> None:
    """Groups are static: scales are those of the stored columns, in whatever order they go."""
    scheme = SCHEMES[name]
    w, stats = _weight(6, 384), _stats(_inputs(512, 384))
    options = replace(PLAIN, compensation="gptq")
    rounded = round_linear(w, stats, scheme, torch.float32, options)
    scale, zero = minmax_params(w, scheme)
    assert torch.equal(rounded.scale, scale)
    assert (zero is None) == (rounded.zero is None)
    assert int(rounded.codes.min()) >= scheme.qmin and int(rounded.codes.max()) <= scheme.qmax


def test_block_size_does_not_matter() -> None:
    w, stats = _weight(6, 256), _stats(_inputs(512, 256))
    results = [
        round_linear(
            w,
            stats,
            SCHEMES["w3a16"],
            torch.float32,
            RoundingOptions(compensation="gptq", block_size=size),
        ).dequantized()
        for size in (32, 128, 256)
    ]
    for other in results[1:]:
        assert _output_error(results[0], other, _inputs(64, 256)) < 1e-3


def test_token_weights() -> None:
    """Weight zero: not there. Weight lambda: as lambda copies, so the root enters the product."""
    x = _inputs(64, 128)
    weights = torch.zeros(64)
    weights[:32] = 1
    some = StatsAccumulator(128)
    some.accumulate(x, token_weights=weights)
    torch.testing.assert_close(some.finish().hessian, _stats(x[:32]).hessian)
    weights[:8] = 3
    weighted = StatsAccumulator(128)
    weighted.accumulate(x, token_weights=weights)
    copies = torch.cat([x[:8], x[:8], x[:32]])
    torch.testing.assert_close(
        weighted.finish().hessian, _stats(copies).hessian, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="non-negative"):
        weighted.accumulate(x, token_weights=-weights)


def test_accumulation_over_batches() -> None:
    x = _inputs(64, 128)
    parts = StatsAccumulator(128)
    parts.accumulate(x[:10])
    parts.accumulate(x[10:])
    torch.testing.assert_close(parts.finish().hessian, _stats(x).hessian)


def test_gptaq_is_gptq_while_nothing_is_lost() -> None:
    w, x = _weight(8, 128), _inputs(256, 128)
    stats = _stats(x, x.clone())
    for kind in ("gptaq", "qronos"):
        options = RoundingOptions(compensation=kind)  # type: ignore[arg-type]
        with_shift = round_linear(w, stats, SCHEMES["w3a16"], torch.float32, options)
        plain = RoundingOptions(compensation="gptq")
        without = round_linear(w, stats, SCHEMES["w3a16"], torch.float32, plain)
        assert torch.equal(with_shift.codes, without.codes)


def test_gptaq_makes_up_for_changed_inputs() -> None:
    """Outputs of full-precision inputs are met better from the inputs that are there."""
    w, x_fp = _weight(16, 128), _inputs(2048, 128)
    generator = torch.Generator().manual_seed(5)
    drift = torch.eye(128) + 0.02 * torch.randn(128, 128, generator=generator)
    x_q = x_fp @ drift
    stats = _stats(x_q, x_fp)
    errors = {}
    for kind in ("gptq", "gptaq", "qronos"):
        options = RoundingOptions(compensation=kind)  # type: ignore[arg-type]
        q = round_linear(w, stats, SCHEMES["w3a16"], torch.float32, options).dequantized()
        errors[kind] = float((x_fp @ w.T - x_q @ q.T).square().mean())
    assert errors["gptaq"] < 0.95 * errors["gptq"]
    assert errors["qronos"] < 0.95 * errors["gptq"]


def test_shift_of_qronos_is_least_squares() -> None:
    w, x_fp = _weight(4, 32), _inputs(512, 32)
    x_q = x_fp + 0.1 * _inputs(512, 32, seed=9)
    stats = _stats(x_q, x_fp)
    assert stats.cross is not None
    factor = comp.factorize(stats.hessian, 1e-9, act_order=True)
    target = comp.shifted_target(w, stats.cross, factor, masked=False)
    expected = torch.linalg.lstsq(x_q.double(), (x_fp @ w.T).double()).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_gptaq_column_by_column(act_order: bool) -> None:
    """Against GPTAQ's own steps, each with the normal equations of the columns that are left.

    Step q: round column q; the columns after it, F, take up its rounding error and its part of
    the inputs' drift: delta w_F = (e_q H_qF + w_q C_qF) H_FF^-1.
    """
    k, scheme = 16, QuantScheme("tiny", bits=3, symmetric=False, group_size=8, servable=False)
    w, x_fp = _weight(3, k).double(), _inputs(300, k)
    x_q = x_fp + 0.2 * _inputs(300, k, seed=9)
    stats = _stats(x_q, x_fp)
    assert stats.cross is not None
    damp = 0.01
    order = torch.argsort(stats.act_energy, descending=True) if act_order else torch.arange(k)
    h = (stats.hessian + damp * torch.diag(stats.act_energy)).double()
    c = stats.cross.double()
    scale, zero = minmax_params(w, scheme)
    assert zero is not None
    now, codes = w.clone(), torch.zeros(3, k)
    for i, q in enumerate(order.tolist()):
        s, z = scale[:, q // 8].double(), zero[:, q // 8].double()
        codes[:, q] = ((now[:, q] / s).round() + z).clamp(0, 7)
        error = now[:, q] - (codes[:, q] - z) * s
        rest = order[i + 1 :]
        right = error[:, None] * h[q, rest] + w[:, q, None] * c[q, rest]
        now[:, rest] += torch.linalg.solve(h[rest][:, rest], right.T).T
    factor = stats.factor(damp, act_order, by_column=True)
    target = comp.shifted_target(w.float(), stats.cross, factor, masked=True)
    ours, _ = comp.gptq(target, factor, scheme, scale, zero, block_size=5)
    assert torch.equal(ours.float(), codes)


def test_damping_by_column_does_not_see_the_scale_of_inputs() -> None:
    """Inputs stretched by powers of two and weights shrunk by them: the same factor."""
    x = _inputs(300, 64)
    stretch = 2.0 ** (torch.arange(64) % 7)
    plain = _stats(x).factor(0.01, False, by_column=True).upper
    stretched = _stats(x * stretch).factor(0.01, False, by_column=True).upper
    torch.testing.assert_close(stretched * stretch, plain, rtol=1e-3, atol=1e-5)
    by_mean = _stats(x * stretch).factor(0.01, False, by_column=False).upper
    assert not torch.allclose(by_mean * stretch, plain, rtol=0.05)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_refit_and_polish_never_raise_the_objective(name: str) -> None:
    scheme = SCHEMES[name]
    w, stats = _weight(16, 384), _stats(_inputs(512, 384))
    dtype = torch.bfloat16
    options = RoundingOptions(compensation="gptq", polish_sweeps=2)
    report = round_linear(w, stats, scheme, dtype, options).report
    assert report["rounds"] <= report["compensation"] * (1 + 1e-5)
    assert report["refit"] <= report["rounds"] * (1 + 1e-5)
    assert report["polish"] <= report["refit"] * (1 + 1e-5)


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_scales_are_what_the_checkpoint_can_store(name: str) -> None:
    scheme = SCHEMES[name]
    rounded = round_linear(
        _weight(8, 256),
        _stats(_inputs(256, 256)),
        scheme,
        torch.bfloat16,
        RoundingOptions(compensation="gptq"),
    )
    stored = torch.float32 if scheme.group_size is None else torch.bfloat16
    assert torch.equal(rounded.scale, rounded.scale.to(stored).float())
    assert (rounded.scale > 0).all()


def test_dead_inputs() -> None:
    x = _inputs(256, 128)
    x[:, 5:40] = 0
    w = _weight(8, 128)
    options = RoundingOptions(compensation="gptq")
    rounded = round_linear(w, _stats(x), SCHEMES["w3a16"], torch.float32, options)
    q = rounded.dequantized()
    assert torch.isfinite(q).all()
    # Nothing is known of these inputs: their weights are kept as well as rounding can.
    step = rounded.scale.repeat_interleave(128, 1)
    assert ((q - w).abs()[:, 5:40] <= 4 * step[:, 5:40]).all()


def test_no_inputs_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        StatsAccumulator(128).finish()


@pytest.mark.parametrize("where", ["weight", "stats"])
def test_nan_is_named(where: str) -> None:
    w, stats = _weight(4, 128), _stats(_inputs(64, 128))
    if where == "weight":
        w[1, 2] = float("nan")
    else:
        stats.hessian[3, 3] = float("inf")
    with pytest.raises(UserError, match="layer 3, q_proj"):
        round_linear(
            w,
            stats,
            SCHEMES["w3a16"],
            torch.float32,
            RoundingOptions(compensation="gptq"),
            "layer 3, q_proj",
        )


def test_same_input_same_bytes() -> None:
    w, stats = _weight(8, 256), _stats(_inputs(256, 256))
    options = RoundingOptions(compensation="gptq")
    first = round_linear(w, stats, SCHEMES["w4a8"], torch.bfloat16, options)
    again = round_linear(w, stats, SCHEMES["w4a8"], torch.bfloat16, options)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scale, again.scale)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="range_search"):
        RoundingOptions(range_search="guess")  # type: ignore[arg-type]
