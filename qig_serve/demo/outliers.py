"""Channel outliers that leave a model's function as it is.

Large models have a few channels far larger than the rest; small ones do not, and shrug off
rounding that ruins a large one. Here such channels are put in after training: a norm's weights
(or up_proj's rows) are scaled up in some channels, and the columns of the linears that read
those channels are scaled down by the same power of two. A power of two moves only the exponent,
so the model computes bit for bit what it did before. Its weights and activations are now as
uneven as a large model's, which plain rounding does not survive and equalization can undo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qig_serve.experts import Experts


@dataclass(frozen=True)
class Outliers:
    """Which share of the channels is scaled, by how much."""

    norm_strength: float = 8.0  # power of two; channels of the norms before attention and MLP
    up_strength: float = 8.0  # power of two; channels between up_proj and down_proj
    share: float = 0.125
    seed: int = 5

    def __post_init__(self) -> None:
        for strength in (self.norm_strength, self.up_strength):
            if math.frexp(strength)[0] != 0.5:
                raise ValueError(f"an outlier's strength must be a power of two, got {strength}")

    def undo(self) -> Outliers:
        """What takes these outliers out again."""
        return Outliers(1 / self.norm_strength, 1 / self.up_strength, self.share, self.seed)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers vision-language model."""
    return list(model.model.language_model.layers)


@torch.no_grad()
def _scale(writer: torch.Tensor, readers: Iterable[Any], chosen: torch.Tensor, by: float) -> None:
    """Scales rows of the writer up, columns of the readers' weights [N, K] down."""
    writer[chosen] = writer[chosen] * by
    for reader in readers:
        reader.weight[:, chosen] = reader.weight[:, chosen] / by


@torch.no_grad()
def add_outliers(model: Any, outliers: Outliers, keep: tuple[int, ...]) -> None:
    """Puts channel outliers into every decoder layer, in place; hidden channels in `keep` stay.

    The hidden channels are the same in every layer, as they are in large models.
    """
    random = torch.Generator().manual_seed(outliers.seed)
    layers = decoder_layers(model)
    hidden = layers[0].input_layernorm.weight.numel()
    order = [c for c in torch.randperm(hidden, generator=random).tolist() if c not in keep]
    chosen = torch.tensor(sorted(order[: round(outliers.share * hidden)]))
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        _scale(layer.input_layernorm.weight.data, qkv, chosen, outliers.norm_strength)
        after = layer.post_attention_layernorm.weight.data
        mlps, readers = _mlps(mlp)
        _scale(after, readers, chosen, outliers.norm_strength)
        for one in mlps:
            inner = one.up_proj.weight.shape[0]
            between = torch.randperm(inner, generator=random)[: round(outliers.share * inner)]
            _scale(one.up_proj.weight.data, (one.down_proj,), between, outliers.up_strength)
            if one.up_proj.bias is not None:
                one.up_proj.bias[between] *= outliers.up_strength


def _mlps(mlp: Any) -> tuple[list[Any], list[Any]]:
    """The gated MLPs of a layer, and all that read its norm; of experts views, and the router."""
    fused = getattr(mlp, "experts", None)
    if fused is None:
        return [mlp], [mlp.gate_proj, mlp.up_proj]
    experts = list(Experts(fused.gate_up_proj.data, fused.down_proj.data, fused.act_fn))
    return experts, [*(x for e in experts for x in (e.gate_proj, e.up_proj)), mlp.gate]


@torch.no_grad()
def activation_spread(model: Any, inputs: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
    """(largest, median) magnitude of the hidden states after the embedding and each layer."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return [(float(s.abs().max()), float(s.float().abs().median())) for s in states]
