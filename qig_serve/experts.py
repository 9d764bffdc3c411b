"""A sparse MLP's experts as ordinary linears: `experts.{e}.gate_proj`, `up_proj`, `down_proj`.

transformers holds all experts of a block in two 3-D parameters. Here each projection is a linear
like any other, so that statistics, ranges, packing and checkpoints treat it as one. Used where a
block is quantized, and where a checkpoint is loaded into plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Activation = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, act_fn: Activation) -> None:
        super().__init__()
        self.gate_proj: nn.Linear
        self.up_proj: nn.Linear
        self.down_proj: nn.Linear
        self.act_fn = act_fn

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the last linear reads: [T, H] -> [T, I]."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        output: torch.Tensor = self.down_proj(self.inner(x))
        return output


class Experts(nn.ModuleList):
    """All experts of a block, called as transformers calls the fused module."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Activation) -> None:
        """gate_up [E, 2 I, H], gate first; down [E, H, I]: the linears' weights are views of them.

        On the meta device they are shapes alone.
        """
        super().__init__(Expert(act_fn) for _ in gate_up)
        half = gate_up.shape[1] // 2
        for e, expert in enumerate(self.experts()):
            expert.gate_proj = _linear(gate_up[e, :half])
            expert.up_proj = _linear(gate_up[e, half:])
            expert.down_proj = _linear(down[e])

    def experts(self) -> Iterator[Expert]:
        """The experts in order."""
        for expert in self:
            assert isinstance(expert, Expert)
            yield expert

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [..., H], the experts of each and their routing weights [T, k] -> [..., H]."""
        shape, hidden_states = hidden_states.shape, hidden_states.flatten(0, -2)
        output = torch.zeros_like(hidden_states)
        k = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self)).tolist()
        for expert, places in zip(self.experts(), order.split(counts), strict=True):
            if not len(places):
                continue
            tokens = places // k
            part = expert(hidden_states[tokens]) * top_k_weights.flatten()[places, None]
            output.index_add_(0, tokens, part.to(output.dtype))
        return output.view(shape)


def count_field(text: Any) -> str:
    """What a decoder's configuration calls the number of a block's experts; "" without any."""
    names = ("num_experts", "n_routed_experts")
    return next((name for name in names if getattr(text, name, None)), "")


def experts_of(block: nn.Module) -> Experts:
    """Those of a block."""
    return next(module for module in block.modules() if isinstance(module, Experts))


def unfuse(model: nn.Module) -> None:
    """Replaces every fused experts module inside a model; memory is shared, not copied."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            owner, _, leaf = name.rpartition(".")
            experts = Experts(module.gate_up_proj.data, module.down_proj.data, module.act_fn)
            setattr(model.get_submodule(owner), leaf, experts)


def _is_fused(module: nn.Module) -> bool:
    found = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in found)


def _linear(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):  # nothing is filled, and nothing random is drawn
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
