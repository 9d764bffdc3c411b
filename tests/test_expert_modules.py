"""Experts as ordinary linears compute what transformers' fused experts compute."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from qig_serve.experts import Experts, experts_of, unfuse
from qig_serve.family_row import any_expert, expert_number


def _sparse_mlp() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3VLMoeTextConfig(
        hidden_size=32, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    mlp = Qwen3VLMoeTextSparseMoeBlock(config).requires_grad_(False)
    for parameter in mlp.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return mlp


def test_the_same_function_and_the_same_memory() -> None:
    mlp = _sparse_mlp()
    fused = mlp.experts
    x = torch.randn(2, 7, 32)
    expected = mlp(x)
    unfuse(mlp)
    assert isinstance(mlp.experts, Experts)
    torch.testing.assert_close(mlp(x), expected)
    assert experts_of(nn.ModuleList([mlp])) is mlp.experts
    names = [name for name, _ in mlp.named_parameters()]
    assert names[:3] == [f"experts.0.{p}_proj.weight" for p in ("gate", "up", "down")]
    storage = mlp.experts[5].up_proj.weight.untyped_storage()
    assert storage.data_ptr() == fused.gate_up_proj.untyped_storage().data_ptr()


def test_experts_without_a_token_and_all_tokens_on_one() -> None:
    mlp = _sparse_mlp()
    fused = mlp.experts
    experts = Experts(fused.gate_up_proj, fused.down_proj, fused.act_fn)
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    for index in ([[3, 1]] * 5, [[0, 5], [5, 0], [0, 1], [5, 1], [1, 0]]):
        chosen = torch.tensor(index)
        torch.testing.assert_close(experts(x, chosen, weights), fused(x, chosen, weights))


def test_numbers_of_experts_in_names() -> None:
    assert any_expert("mlp.experts.17.up_proj") == "mlp.experts.*.up_proj"
    assert any_expert("experts.0.down_proj") == "experts.*.down_proj"
    assert expert_number("experts.0.down_proj") == 0 and expert_number("mlp.experts.17.up") == 17
    for name in ("mlp.shared_expert.up_proj", "mlp.shared_experts.1.up_proj", "experts.up_proj"):
        assert any_expert(name) == name and expert_number(name) is None
