"""The grid search: what it minimizes, on which inputs, and what it must ignore."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.blocks import DOWN, GATE_UP, QKV, O, make_block

from qig_serve.errors import UserError
from qig_serve.formats import get_scheme
from qig_serve.offline.equalization.search import (
    Candidate,
    SearchBatch,
    best,
    evaluate_candidates,
)
from qig_serve.offline.passes.capture import ModuleCall, catch_call, run_module
from qig_serve.offline.passes.parts import inner_names
from qig_serve.packing import fake_quantize, fake_quantize_activation


def batch_of(
    group: object, weights: torch.Tensor | None = None
) -> tuple[torch.nn.Module, SearchBatch]:
    block, kwargs, x = make_block()
    module = block.get_submodule(group.loss_module)
    call = catch_call(block, module, x, kwargs)
    target = run_module(module, call)
    if weights is None:
        weights = torch.full((2, 12), 1 / 12)
    return module, SearchBatch(call, target, weights)


def scaled(k: int, exponent: float = 0.5) -> Candidate:
    columns = torch.logspace(-0.5, 0.5, k)
    return Candidate(exponent, columns, columns)


@pytest.mark.parametrize("scheme_name", ["w3a16", "w4a8"])
def test_loss_of_a_linear_written_out(scheme_name: str) -> None:
    scheme = get_scheme(scheme_name)
    module, batch = batch_of(DOWN, torch.rand(2, 12))
    candidate = scaled(384)
    (loss,) = evaluate_candidates(
        module, [""], [candidate], lambda: [batch], scheme, torch.float32, "here"
    )
    x, s = batch.call.hidden / candidate.columns, candidate.columns
    if scheme.activation_bits:
        x = fake_quantize_activation(x)
    error = x @ fake_quantize(module.weight * s, scheme).T - batch.call.hidden @ module.weight.T
    expected = (error.abs().mean(-1) * batch.token_weights).sum() / batch.token_weights.sum()
    assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("group", [QKV, O, GATE_UP, DOWN], ids=lambda g: g.name)
def test_unquantized_weights_would_lose_nothing(group: object) -> None:
    """At 256 levels only the scales are left: f(X / s, W s) = f(X, W) for every group."""
    fine = replace(get_scheme("w2a16"), bits=8)
    module, batch = batch_of(group)
    k = batch.call.hidden.shape[-1]
    (loss,) = evaluate_candidates(
        module, inner_names(group), [scaled(k)], lambda: [batch], fine, torch.float32, "x"
    )
    assert loss < 0.03 * float(batch.target.abs().mean())


def test_w4a8_quantizes_every_linear_of_the_module() -> None:
    """Inside the MLP, down_proj's input is int8 too, though only gate and up are searched."""
    module, batch = batch_of(GATE_UP)
    ones = Candidate(0.0, torch.ones(256), torch.ones(256))
    scheme = get_scheme("w4a8")
    (with_all,) = evaluate_candidates(
        module, ["gate_proj", "up_proj"], [ones], lambda: [batch], scheme, torch.float32, "x"
    )
    x = fake_quantize_activation(batch.call.hidden)
    g = x @ fake_quantize(module.gate_proj.weight, scheme).T
    u = x @ fake_quantize(module.up_proj.weight, scheme).T
    h = torch.nn.functional.silu(g) * u
    out = fake_quantize_activation(h) @ module.down_proj.weight.T
    assert with_all == pytest.approx(float((out - batch.target).abs().mean()), rel=1e-4)


def test_tokens_without_weight_do_not_count() -> None:
    weights = torch.full((2, 12), 1 / 8)
    weights[:, 8:] = 0
    module, batch = batch_of(DOWN, weights)
    dirty = batch.call.hidden.clone()
    dirty[:, 8:] = 1e4
    other = SearchBatch(ModuleCall((dirty,), {}), batch.target, weights)
    arguments = (get_scheme("w3a16"), torch.float32, "here")
    clean = evaluate_candidates(module, [""], [scaled(384)], lambda: [batch], *arguments)
    same = evaluate_candidates(module, [""], [scaled(384)], lambda: [other], *arguments)
    assert clean == pytest.approx(same, rel=1e-6)


def test_batches_add_up() -> None:
    """The search sees one batch at a time; two halves give what the whole gives."""
    module, batch = batch_of(DOWN, torch.rand(2, 12))
    halves = [
        SearchBatch(
            batch.call.with_input(batch.call.hidden[i : i + 1]),
            batch.target[i : i + 1],
            batch.token_weights[i : i + 1],
        )
        for i in range(2)
    ]
    arguments = (get_scheme("w3a16"), torch.float32, "here")
    whole = evaluate_candidates(module, [""], [scaled(384)], lambda: [batch], *arguments)
    parts = evaluate_candidates(module, [""], [scaled(384)], lambda: halves, *arguments)
    assert whole == pytest.approx(parts, rel=1e-5)


def test_not_a_number_names_the_layer() -> None:
    module, batch = batch_of(DOWN)
    batch.call.hidden[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="layer 3, down"):
        evaluate_candidates(
            module,
            [""],
            [scaled(384)],
            lambda: [batch],
            get_scheme("w3a16"),
            torch.float32,
            "layer 3, down",
        )


def test_of_equal_losses_the_first() -> None:
    assert best([2.0, 1.0, 1.0]) == 1
