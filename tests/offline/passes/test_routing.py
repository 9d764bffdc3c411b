"""What calibrates an expert: the tokens routed to it, and all of them where these are few."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_experts import streams_of
from torch import nn

from qig_serve.offline.equalization.block import equalize_block
from qig_serve.offline.passes import routing
from qig_serve.offline.passes.capture import catch_call
from qig_serve.offline.passes.parts import capture_parts
from qig_serve.offline.passes.routing import capture_routed
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import ROUNDINGS
from qig_serve.offline.results import GroupResult
from qig_serve.offline.rounding.statistics import BlockStatistics
from qig_serve.offline.source.loaded_model import LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Streams]:
    loaded, streams, _ = streams_of(tmp_path_factory.mktemp("routing"))
    return loaded, streams


@pytest.fixture
def all_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """No expert that has seen a token is rare."""
    monkeypatch.setattr(routing, "RARE", 1 / 256)


def _weights(streams: Streams) -> list[torch.Tensor]:
    """Token weights of each batch, [B, T]."""
    generator = torch.Generator().manual_seed(5)
    masks = [streams.mask(b) for b in range(len(streams))]
    return [torch.rand(mask.shape, generator=generator) * mask for mask in masks]


def _statistics(loaded: LoadedModel, streams: Streams, block: nn.Module) -> Any:
    method = ROUNDINGS["gptq-weighted"]
    return BlockStatistics(block, block, loaded.linears(block), streams, method, "layer 0")


def _sparse_outputs(block: nn.Module, streams: Streams) -> list[torch.Tensor]:
    """Of the experts module, [n, H], of each batch."""
    found = []
    for b in range(len(streams)):
        hidden = streams.quantized.get(b, streams.device)
        call = catch_call(block, block.mlp.experts, hidden, streams.kwargs(b))
        found.append(block.mlp.experts(*call.args).flatten(0, -2))
    return found


@torch.no_grad()
def test_the_hessian_is_what_the_sparse_mlp_loses(
    model: tuple[LoadedModel, Streams], all_common: None
) -> None:
    """sum_t lambda_t |output_t - output'_t|^2, where one expert's down has another weight."""
    loaded, streams = model
    block = loaded.block(0)
    weights = _weights(streams)
    statistics = _statistics(loaded, streams, block)
    before = _sparse_outputs(block, streams)
    found = capture_routed(block, streams, streams.quantized, "routed", "layer 0")
    expert = max(range(8), key=found.report.tokens.__getitem__)
    name = f"mlp.experts.{expert}.down_proj"
    stats = statistics.of(name, GroupResult(None, weights))
    down = block.get_submodule(name)
    change = torch.randn(down.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    down.weight.add_(change)
    after = _sparse_outputs(block, streams)
    lost = total = 0.0
    for b, (x, y) in enumerate(zip(before, after, strict=True)):
        real = weights[b].flatten()
        lost += float((real * (x - y).double().square().sum(-1)).sum())
        total += float(found.token_weights(b, expert, real, 2).double().sum())
    predicted = float(((change @ stats.hessian) * change).sum()) * total
    assert predicted == pytest.approx(lost, rel=1e-4)
    assert stats.tokens == found.report.tokens[expert] > 0


@torch.no_grad()
def test_inputs_of_gate_and_up_are_the_tokens_routed(
    model: tuple[LoadedModel, Streams], all_common: None
) -> None:
    loaded, streams = model
    block = loaded.block(0)
    seen: dict[int, list[torch.Tensor]] = {e: [] for e in range(8)}
    handles = [
        expert.register_forward_pre_hook(lambda _, args, e=e: seen[e].append(args[0]))
        for e, expert in enumerate(block.mlp.experts)
    ]
    routed = capture_routed(block, streams, streams.fp, "routed", "layer 0")
    assert not any(seen.values())  # caught before any expert has run
    for b in range(len(streams)):
        block(streams.fp.get(b, streams.device), **streams.kwargs(b))
    for handle in handles:
        handle.remove()
    for e, parts in seen.items():
        everything = torch.cat([torch.zeros(0, 256), *parts])
        ours = [routed.tokens(b, e, streams.device) for b in range(len(streams))]
        if e in routed.report.rare:
            assert routed.report.tokens[e] == 0
            continue
        assert len(torch.cat(ours)) == routed.report.tokens[e] <= len(everything)
        for row in torch.cat(ours):
            assert (everything == row).all(-1).any()


@torch.no_grad()
def test_a_rare_expert_is_calibrated_on_all_tokens(model: tuple[LoadedModel, Streams]) -> None:
    loaded, streams = model
    block = loaded.block(0)
    weights = _weights(streams)
    statistics = _statistics(loaded, streams, block)
    tokens = sum(batch.token_mask.numel() for batch in streams.batches)
    first = statistics.of("mlp.experts.0.up_proj", GroupResult(None, weights))
    report = statistics.experts
    assert report is not None and report.least == 64
    assert sum(report.tokens) == 2 * tokens
    assert report.rare == [e for e, n in enumerate(report.tokens) if n < 64]
    rare = report.rare[0]
    stats = statistics.of(f"mlp.experts.{rare}.up_proj", GroupResult(None, weights))
    router = [
        catch_call(block, block.mlp, streams.quantized.get(b, "cpu"), streams.kwargs(b)).hidden
        for b in range(len(streams))
    ]
    x = torch.cat([h.flatten(0, -2) for h in router])
    w = torch.cat([w.flatten() for w in weights])
    torch.testing.assert_close(stats.hessian, (x.T * w) @ x / w.sum(), rtol=1e-4, atol=1e-6)
    assert stats.tokens == tokens
    assert first.tokens == (tokens if 0 in report.rare else report.tokens[0])


def test_in_a_dry_run_experts_are_as_rare_as_they_will_be(
    model: tuple[LoadedModel, Streams],
) -> None:
    loaded, streams = model
    block = loaded.block(0)
    part = replace(streams, share=1 / 4)
    found = capture_routed(block, part, part.fp, "routed", "layer 0").report
    assert found.least == 64 // 4
    assert found.rare == [e for e, n in enumerate(found.tokens) if n < 16]


@torch.no_grad()
def test_equalized_experts_compute_what_they_did(model: tuple[LoadedModel, Streams]) -> None:
    """And the report of all of them is one."""
    _, streams = model
    loaded, _, recipe = streams_of(model[0].directory.parent, method="awq")
    original = loaded.block(0)
    block = copy.deepcopy(original)
    groups = loaded.groups(block)
    results: list[GroupResult] = []
    steps = list(equalize_block(block, groups, streams, recipe.equalization, None, 0, results))
    assert [name for _, name in steps] == ["qkv", "o", "gate_up", "experts_down"]
    assert [done for done, _ in steps] == [0, 0.25, 0.5, 0.75]
    assert len(results) == len(groups) == 11
    reports = [r.report for r in results if r.report is not None]
    assert [r.name for r in reports] == ["qkv", "o", "gate_up", "experts_down"]
    assert all(r.loss < r.loss_rtn for r in reports)
    assert len(reports[-1].linears) == 8 and len(reports[-1].losses) == 4
    hidden, kwargs = streams.fp.get(0, "cpu"), streams.kwargs(0)
    torch.testing.assert_close(
        block(hidden, **kwargs), original(hidden, **kwargs), rtol=2e-2, atol=2e-2
    )
    changed = {name for r in results for name in r.changed}
    assert "mlp.gate.weight" in changed and "post_attention_layernorm.weight" in changed
    for e in range(8):
        name = f"mlp.experts.{e}.up_proj.weight"
        assert not torch.equal(block.get_parameter(name), original.get_parameter(name))


@torch.no_grad()
def test_parts_of_experts_beside_an_mlp_keep_their_tokens_routing(tmp_path: Path) -> None:
    """Cut elsewhere than the batches; of full precision also where other inputs are caught."""
    loaded, streams, _ = streams_of(tmp_path, "gemma4_moe")
    block = loaded.block(0)
    group = next(g for g in loaded.groups(block) if g.name == "experts_gate_up")
    for b in range(len(streams)):  # a quantized prefix that routes otherwise
        streams.quantized.put(b, streams.fp.get(b, "cpu").flip(-1))
    streams = replace(streams, batch_tokens=37)
    expected, other = [], []
    for b in range(len(streams)):
        for found, stream in ((expected, streams.fp), (other, streams.quantized)):
            call = catch_call(block, block.experts, stream.get(b, "cpu"), streams.kwargs(b))
            output = block.experts(*call.args) if stream is streams.fp else call.hidden
            found.append(output[streams.mask(b)])
    parts = capture_parts(block, group, streams, True, "layer 0")
    assert parts.tokenwise and len(parts.calls) > len(streams) and parts.quantized_inputs
    count = range(len(parts.calls))
    assert parts.inputs.get(0, "cpu").shape[:2] == (1, 37)
    found = torch.cat([parts.targets.get(i, "cpu")[0] for i in count])
    torch.testing.assert_close(found, torch.cat(expected))
    found = torch.cat([parts.quantized_inputs.get(i, "cpu")[0] for i in count])
    assert torch.equal(found, torch.cat(other))


@torch.no_grad()
def test_equalized_experts_beside_an_mlp_compute_what_they_did(tmp_path: Path) -> None:
    """The router reads what no scale is folded into."""
    loaded, streams, recipe = streams_of(tmp_path, "gemma4_moe", method="smoothquant")
    original = loaded.block(0)
    block = copy.deepcopy(original)
    groups = loaded.groups(block)
    results: list[GroupResult] = []
    steps = list(equalize_block(block, groups, streams, recipe.equalization, None, 0, results))
    common = ["qkv", "o", "gate_up", "down", "experts_gate_up"]
    assert [name for _, name in steps] == [*common, "experts_down"]
    reports = [r.report for r in results if r.report is not None]
    assert [r.loss_module for r in reports][-2:] == ["experts", "experts"]
    folded = next(r.columns for g, r in zip(groups, results, strict=True) if g.name == common[-1])
    assert folded is not None and folded.std() > 0.1
    changed = {name for r in results for name in r.changed}
    assert "pre_feedforward_layernorm_2.weight" in changed
    assert not any(name.startswith("router") for name in changed)
    hidden, kwargs = streams.fp.get(0, "cpu"), streams.kwargs(0)
    torch.testing.assert_close(
        block(hidden, **kwargs), original(hidden, **kwargs), rtol=2e-2, atol=2e-2
    )
