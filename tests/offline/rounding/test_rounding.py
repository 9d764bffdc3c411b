"""Rounding methods and GPTQ: against exact cases, brute force, and each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from qig_serve.errors import UserError
from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.offline.passes.hessian import LinearStats, StatsAccumulator
from qig_serve.offline.recipe import ROUNDINGS, Damping
from qig_serve.offline.rounding import gptq
from qig_serve.offline.rounding.gptq import compensated_codes
from qig_serve.offline.rounding.linear import round_linear
from qig_serve.offline.rounding.rounded import RoundingTask, objective
from qig_serve.packing import dequantize, minmax_params, quantize

SCHEME_NAMES = sorted(SCHEMES)
NEAREST, GPTQ = ROUNDINGS["nearest"], ROUNDINGS["gptq"]


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


def _stats(x: torch.Tensor) -> LinearStats:
    accumulator = StatsAccumulator(x.shape[1])
    accumulator.accumulate(x)
    return accumulator.finish()


def _output_error(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (w - q).T).square().mean())


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_methods_lower_the_output_error(name: str) -> None:
    w, x = _weight(24, 256), _inputs(512, 256)
    stats = _stats(x)
    errors = {}
    for method in ("nearest", "clip", "gptq"):
        rounded = round_linear(w, stats, SCHEMES[name], torch.float32, ROUNDINGS[method])
        errors[method] = _output_error(w, rounded.dequantized(), x)
        assert rounded.report.error_rtn >= rounded.report.error > 0
    assert errors["clip"] < errors["nearest"] and errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_without_correlation_gptq_is_rounding(name: str) -> None:
    scheme = SCHEMES[name]
    w = _weight(5, 256)
    stats = LinearStats(torch.diag(torch.rand(256) + 0.5), 1)
    rounded = round_linear(w, stats, scheme, torch.float32, GPTQ)
    scale, zero = minmax_params(w, scheme)
    assert torch.equal(rounded.codes, quantize(w, scale, zero, scheme))


def test_close_to_the_optimum_of_a_small_problem() -> None:
    """Against all 4^6 choices of codes: better than rounding, and near the best there is."""
    scheme = QuantScheme("tiny", bits=2, symmetric=False, group_size=6, servable=False)
    method = replace(GPTQ, damping=Damping(1e-6))
    levels = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    ours, optimum, nearest = 0.0, 0.0, 0.0
    for seed in range(48):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(1, 6, generator=generator)
        x = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
        stats = _stats(x)
        scale, zero = minmax_params(w, scheme)
        every = dequantize(levels, scale.expand(len(levels), 1), zero.expand(len(levels), 1))
        optimum += float(objective(w - every, stats.hessian).min())
        rounded = round_linear(w, stats, scheme, torch.float32, method)
        ours += float(objective(w - rounded.dequantized(), stats.hessian))
        rtn = round_linear(w, stats, scheme, torch.float32, NEAREST)
        nearest += float(objective(w - rtn.dequantized(), stats.hessian))
    assert optimum <= ours < 0.7 * nearest
    assert ours < 1.6 * optimum


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_act_order_keeps_the_groups_of_the_layout(name: str) -> None:
    """Groups are static: scales are those of the stored columns, in whatever order they go."""
    scheme = SCHEMES[name]
    w, stats = _weight(6, 384), _stats(_inputs(512, 384))
    rounded = round_linear(w, stats, scheme, torch.float32, GPTQ)
    scale, zero = minmax_params(w, scheme)
    assert torch.equal(rounded.scale, scale)
    assert (zero is None) == (rounded.zero is None)
    assert int(rounded.codes.min()) >= scheme.qmin and int(rounded.codes.max()) <= scheme.qmax


def test_block_size_does_not_matter() -> None:
    scheme = SCHEMES["w3a16"]
    w, stats = _weight(6, 256), _stats(_inputs(512, 256))
    scale, zero = minmax_params(w, scheme)
    factor = stats.factor(Damping())
    results = [
        dequantize(compensated_codes(w, factor, scheme, scale, zero, size), scale, zero)
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


def test_gptq_column_by_column() -> None:
    """Against GPTQ's own steps, each with the normal equations of the columns that are left.

    Step q: round column q; the columns after it, F, take up its error:
    delta w_F = e_q H_qF H_FF^-1.
    """
    k, scheme = 16, QuantScheme("tiny", bits=3, symmetric=False, group_size=8, servable=False)
    w, stats = _weight(3, k).double(), _stats(_inputs(300, k))
    energy = stats.hessian.diagonal()
    order = torch.argsort(energy, descending=True)
    h = (stats.hessian + 0.01 * torch.diag(energy)).double()
    scale, zero = minmax_params(w, scheme)
    assert zero is not None
    now, codes = w.clone(), torch.zeros(3, k)
    for i, q in enumerate(order.tolist()):
        s, z = scale[:, q // 8].double(), zero[:, q // 8].double()
        codes[:, q] = ((now[:, q] / s).round() + z).clamp(0, 7)
        error = now[:, q] - (codes[:, q] - z) * s
        rest = order[i + 1 :]
        right = error[:, None] * h[q, rest]
        now[:, rest] += torch.linalg.solve(h[rest][:, rest], right.T).T
    factor = stats.factor(Damping())
    ours = compensated_codes(w.float(), factor, scheme, scale, zero, block_size=5)
    assert torch.equal(ours.float(), codes)


def test_damping_by_column_does_not_see_the_scale_of_inputs() -> None:
    """Inputs stretched by powers of two and weights shrunk by them: the same inverse."""
    x = _inputs(300, 64)
    stretch = 2.0 ** (torch.arange(64) % 7)

    def inverse(inputs: torch.Tensor, damping: Damping) -> torch.Tensor:
        factor = _stats(inputs).factor(damping)
        found = factor.upper.T @ factor.upper
        back = factor.order.argsort()
        return found[back][:, back]

    plain = inverse(x, Damping())
    stretched = inverse(x * stretch, Damping()) * stretch * stretch[:, None]
    torch.testing.assert_close(stretched, plain, rtol=1e-3, atol=1e-5)
    by_mean = inverse(x * stretch, Damping(by="mean")) * stretch * stretch[:, None]
    assert not torch.allclose(by_mean, plain, rtol=0.05)


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_scales_are_what_the_checkpoint_can_store(name: str) -> None:
    scheme = SCHEMES[name]
    rounded = round_linear(
        _weight(8, 256),
        _stats(_inputs(256, 256)),
        scheme,
        torch.bfloat16,
        GPTQ,
    )
    stored = torch.float32 if scheme.group_size is None else torch.bfloat16
    assert torch.equal(rounded.scale, rounded.scale.to(stored).float())
    assert (rounded.scale > 0).all()


def test_dead_inputs() -> None:
    x = _inputs(256, 128)
    x[:, 5:40] = 0
    w = _weight(8, 128)
    rounded = round_linear(w, _stats(x), SCHEMES["w3a16"], torch.float32, GPTQ)
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
            GPTQ,
            "layer 3, q_proj",
        )


def test_same_input_same_bytes() -> None:
    w, stats = _weight(8, 256), _stats(_inputs(256, 256))
    first = round_linear(w, stats, SCHEMES["w4a8"], torch.bfloat16, GPTQ)
    again = round_linear(w, stats, SCHEMES["w4a8"], torch.bfloat16, GPTQ)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scale, again.scale)


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
def test_every_row_has_the_ranges_that_suit_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three candidates the best by the error behind compensation; in pieces of rows as well."""
    torch.manual_seed(6)
    scheme = SCHEMES[name]
    weight, x = torch.randn(23, 256), torch.randn(600, 256)
    accumulator = StatsAccumulator(256)
    accumulator.accumulate(x)
    stats = accumulator.finish()
    task = RoundingTask(weight, scheme, torch.float32, GPTQ, stats)
    scale, zero = minmax_params(weight, scheme)
    candidates = [(scale * shrink, zero) for shrink in (1.0, 0.9, 0.7)]
    alone = [gptq.compensate(task, weight, [candidate]) for candidate in candidates]
    left = torch.stack([objective(weight - r.dequantized(), stats.hessian) for r in alone])
    for elements in (1 << 26, 7 * 256 * 3):
        monkeypatch.setitem(gptq.ELEMENTS, "cpu", elements)
        found = gptq.compensate(task, weight, candidates)
        ours = objective(weight - found.dequantized(), stats.hessian)
        torch.testing.assert_close(ours, left.amin(0))
    assert len(left.argmin(0).unique()) > 1
