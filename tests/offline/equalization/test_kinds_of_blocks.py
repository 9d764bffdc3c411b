"""Groups beyond those of a plain block: gated delta-net, and parts of fused linears."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qig_serve.architectures import get_architecture
from qig_serve.family_row import SmoothingGroup
from qig_serve.formats import get_scheme
from qig_serve.offline.equalization.search import Candidate, SearchBatch, evaluate_candidates
from qig_serve.offline.equalization.smoothing import (
    fold,
    group_scales,
    output_of_channel,
    outputs,
    previous_outputs,
)
from qig_serve.offline.passes.capture import ModuleCall, all_linears
from qig_serve.offline.passes.parts import inner_names

DELTA = get_architecture("qwen3_5").other_groups[0]


def delta_block() -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    """A random block of gated delta-net: 4 value heads of 64 on 2 key heads."""
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention"],
    )
    block = Qwen3_5DecoderLayer(config, 0).eval().requires_grad_(False)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_((torch.randn_like(module.weight) / 16).bfloat16())
    return block, {"position_embeddings": None}, torch.randn(2, 12, 256)


def spread(count: int) -> torch.Tensor:
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("group", DELTA, ids=lambda g: g.name)
def test_a_fold_reaches_every_reader(group: SmoothingGroup) -> None:
    block, kwargs, x = delta_block()
    before = block(x, **kwargs)
    wrong = copy.deepcopy(block)
    read = outputs(block, group)
    scales = spread(read.stop - read.start)
    changed = fold(block, group, scales, torch.float32)
    assert set(changed) >= {f"{name}.weight" for name in group.readers}
    torch.testing.assert_close(block(x, **kwargs), before, rtol=1e-4, atol=1e-5)
    if group.readers:
        for name in group.readers:  # as if the fold had left them out
            kept = wrong.get_submodule(name).weight.clone()
            fold(wrong, group, scales, torch.float32)
            wrong.get_submodule(name).weight.copy_(kept)
            break
        assert (wrong(x, **kwargs) - before).norm() / before.norm() > 0.01


def test_what_stays_in_16_bits_is_stored_in_the_models_dtype() -> None:
    block, _, _ = delta_block()
    fold(block, DELTA[0], spread(256), torch.bfloat16)
    for name in DELTA[0].readers:
        weight = block.get_submodule(name).weight
        assert torch.equal(weight, weight.bfloat16().float())


def test_one_norm_weight_for_all_heads() -> None:
    block, _, _ = delta_block()
    out = DELTA[1]
    means = torch.arange(256.0)
    shared = previous_outputs(block, out, means)
    assert torch.equal(shared, means.view(4, 64).mean(0))
    columns = group_scales(block, out, shared + 1, torch.float32)
    torch.testing.assert_close(columns, (shared + 1).repeat(4))
    assert output_of_channel(block, out, 64).tolist() == list(range(64)) * 4


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_the_search_scales_all_that_read_the_norm(scheme: str) -> None:
    """With fine enough codes a candidate costs nothing; in 16 bits a reader's input is not int8."""
    block, _, x = delta_block()
    group, module = DELTA[0], block.linear_attn
    columns = spread(256)
    target = module(x)
    batch = SearchBatch(ModuleCall((x,), {}), target, torch.ones(2, 12))
    readers = inner_names(group, group.readers)
    arguments = (lambda: [batch], get_scheme(scheme), torch.float32, "here")
    names, candidates = inner_names(group), [Candidate(0.0, columns, columns)]
    (with_readers,) = evaluate_candidates(module, names, candidates, *arguments, readers=readers)
    (without,) = evaluate_candidates(module, names, candidates, *arguments)
    assert with_readers < without
    kept = {module.get_submodule(name) for name in readers}
    assert kept.isdisjoint(all_linears(module, readers)) and kept <= set(all_linears(module))


def test_a_part_of_a_fused_linear() -> None:
    """GLM-4V: down reads the second half of gate_up_proj, and its scales divide that half alone."""
    group = get_architecture("glm4v").groups[-1]
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.gate_up_proj = nn.Linear(128, 512)
    block.mlp.down_proj = nn.Linear(256, 128)
    block.requires_grad_(False)
    before = block.mlp.gate_up_proj.weight.clone()
    scales = spread(256)
    assert previous_outputs(block, group, scales) is scales
    assert fold(block, group, scales, torch.float32) == ["mlp.gate_up_proj.bias"]
    assert torch.equal(block.mlp.gate_up_proj.weight[:256], before[:256])
    torch.testing.assert_close(block.mlp.gate_up_proj.weight[256:], before[256:] / scales[:, None])
