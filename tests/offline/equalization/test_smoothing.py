"""Folding equalization scales: the function stays, whatever is stored in 16 bits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.blocks import DOWN, GATE_UP, QKV, O, make_block
from torch import nn

from qig_serve.family_row import SmoothingGroup
from qig_serve.offline.equalization.smoothing import (
    fold,
    group_scales,
    power_scales,
    previous_outputs,
    repeat_over_heads,
    share_over_heads,
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def spread_scales(n: int) -> torch.Tensor:
    """Scales over four orders of magnitude."""
    return torch.logspace(-2, 2, n)[torch.randperm(n)]


@pytest.mark.parametrize("group", [QKV, GATE_UP, DOWN], ids=lambda g: g.name)
def test_folding_preserves_the_function(group: SmoothingGroup) -> None:
    block, kwargs, x = make_block()
    before = block(x, **kwargs)
    outputs = 384 if group is DOWN else 256
    changed = fold(block, group, spread_scales(outputs), torch.bfloat16)
    # The norm is stored in bf16 and its rounding taken up by the columns: nothing is lost.
    assert relative(block(x, **kwargs), before) < 1e-5
    assert changed == ([f"{group.previous}.weight"] if group.kind == "norm" else [])


def test_folding_v_into_o_with_shared_heads() -> None:
    block, kwargs, x = make_block()
    before = block(x, **kwargs)
    bias = block.self_attn.v_proj.bias.clone()
    scales = spread_scales(128)  # 2 kv heads of 64, each read by 2 query heads
    changed = fold(block, O, scales, torch.float32)
    assert relative(block(x, **kwargs), before) < 1e-5
    torch.testing.assert_close(block.self_attn.v_proj.bias, bias / scales)
    assert changed == ["self_attn.v_proj.bias"]


def test_bias_is_stored_in_the_models_dtype() -> None:
    block, kwargs, x = make_block()
    before = block(x, **kwargs)
    fold(block, O, spread_scales(128), torch.bfloat16)
    bias = block.self_attn.v_proj.bias
    assert torch.equal(bias, bias.bfloat16().float())
    assert relative(block(x, **kwargs), before) < 5e-3


def test_norm_with_offset() -> None:
    """Gemma's norm multiplies by 1 + w."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Module()
            self.norm.weight = nn.Parameter((0.5 * torch.randn(128)).bfloat16().float())
            self.linear = nn.Linear(128, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * (1 + self.norm.weight))

    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    x = torch.randn(5, 128)
    before = block(x)
    group = SmoothingGroup(
        name="g",
        previous="norm",
        linears=("linear",),
        loss_module="linear",
        kind="norm",
        norm_offset=1.0,
    )
    wrong = copy.deepcopy(block)
    fold(block, group, spread_scales(128), torch.bfloat16)
    assert relative(block(x), before) < 1e-4
    assert torch.equal(block.norm.weight, block.norm.weight.bfloat16().float())
    fold(wrong, replace(group, norm_offset=0.0), spread_scales(128), torch.bfloat16)
    assert relative(wrong(x), before) > 0.1


def test_heads_that_share_keys_share_scales() -> None:
    values = torch.arange(256.0)  # 4 query heads of 64
    shared = share_over_heads(values, 128, 64)
    expected = torch.cat(
        [(values[0:64] + values[64:128]) / 2, (values[128:192] + values[192:]) / 2]
    )
    assert torch.equal(shared, expected)
    repeated = repeat_over_heads(shared, 256, 64)
    assert torch.equal(repeated[:64], repeated[64:128])
    assert torch.equal(repeated[128:192], shared[64:])


def test_v_to_o_is_equalized_under_grouped_query_attention() -> None:
    """The released code skips it for every GQA model."""
    block, _, _ = make_block()
    act_mean = torch.rand(256) + 0.1
    small = previous_outputs(block, O, act_mean)
    assert small.shape == (128,)
    scales = power_scales(small, 0.5)
    columns = group_scales(block, O, scales, torch.bfloat16)
    assert columns.shape == (256,)
    assert float(columns.std()) > 0


def test_scales_are_floored_and_normalized() -> None:
    a = torch.tensor([0.0, 1e-9, 1.0, 100.0])
    s = power_scales(a, 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-4)
    assert float(s[3] / s[2]) == pytest.approx(10, rel=1e-4)
    assert float(s[2] / s[0]) == pytest.approx(1e4, rel=1e-4)
    assert torch.allclose(power_scales(a, 0.0), torch.ones(4))
