"""Importance from the attention that tokens receive, one of the QIG paper's other sensitivities."""

from __future__ import annotations

import torch
from torch import nn

from qig_serve.offline.passes.capture import ModuleCall


@torch.no_grad()
def attention_importance(
    attention: nn.Module, call: ModuleCall, token_mask: torch.Tensor
) -> torch.Tensor:
    """Attention that each token receives, mean over heads and over real queries; [B, T].

    `call` is the block's call of its attention module. Runs it with the eager implementation,
    the one that returns its weights.
    """
    config = attention.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        output = attention(*call.args, **{**call.kwargs, **_additive_mask(call)})
    finally:
        config._attn_implementation = before
    weights = output[1]  # [B, H, queries, keys]
    queries = token_mask[:, None, :, None]
    received = (weights * queries).sum(2).mean(1) / token_mask.sum(-1, keepdim=True)
    return received * token_mask


def _additive_mask(call: ModuleCall) -> dict[str, torch.Tensor]:
    """The attention mask as eager attention wants it: added to the scores, causal if absent."""
    hidden, mask = call.hidden, call.kwargs.get("attention_mask")
    if mask is None:
        t = hidden.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask.dtype == torch.bool:
        low = torch.finfo(hidden.dtype).min
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
            ~mask, low
        )
    return {"attention_mask": mask}
