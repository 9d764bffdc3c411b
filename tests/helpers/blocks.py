"""One random decoder block, and the smoothing groups of a pre-norm block."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from qig_serve.architectures import get_architecture

GROUPS = get_architecture("qwen2_vl").groups
QKV, O, GATE_UP, DOWN = GROUPS


def make_block() -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """A Qwen2 block with GQA (4 heads, 2 kv heads), its keyword arguments, and an input."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    block = Qwen2DecoderLayer(config, 0).eval().requires_grad_(False)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(torch.randn_like(module.weight) / module.in_features**0.5)
            if module.bias is not None:
                module.bias.copy_(torch.randn_like(module.bias).bfloat16())
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.weight.copy_((1 + 0.3 * torch.randn(256)).bfloat16())
    x = torch.randn(2, 12, 256)
    positions = torch.arange(12)[None]
    rotary = Qwen2RotaryEmbedding(config)(x, positions)
    return block, {"position_embeddings": rotary, "attention_mask": None}, x
