"""Starts a demonstration model from the decoder of another one: a third of the training is saved.

The tokens that both vocabularies have keep their embeddings, every layer of the source is copied,
and layers in between start as the identity (their residual writers are zero). A narrower MLP keeps
its source's strongest neurons. The vision tower starts from nothing, unless the source has one
of the same build: then it begins with all that has a place of the same shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.model import load_model
from qig_serve.demo.outliers import Outliers, add_outliers, decoder_layers

THE_BUNDLED = "bundled"  # the model in this package, its channel outliers taken out
LACKING = 0.25  # of the source's neurons, that an expert lacks at least, so that experts differ

# Qwen2-VL's tower, by the names that Qwen3-VL has for the same modules.
_TOWER_NAMES = (
    (".mlp.fc", ".mlp.linear_fc"),
    ("merger.ln_q.", "merger.norm."),
    ("merger.mlp.0.", "merger.linear_fc1."),
    ("merger.mlp.2.", "merger.linear_fc2."),
)


def _source(name: Path | str, sink_channel: int) -> tuple[Any, Any]:
    if str(name) != THE_BUNDLED:
        return load_model(name, torch.float32)
    model, processor = load_model(MODEL_DIR, torch.float32)
    add_outliers(model, Outliers().undo(), keep=(sink_channel,))
    return model, processor


def strongest_neurons(mlp: Any, count: int) -> torch.Tensor:
    """Indices [count] of the MLP neurons with the largest product of weight norms, in order."""
    norms = (
        mlp.gate_proj.weight.norm(dim=1)
        * mlp.up_proj.weight.norm(dim=1)
        * mlp.down_proj.weight.norm(dim=0)
    )
    if count > norms.numel():
        raise ValueError(f"the source's MLP has {norms.numel()} neurons, {count} were asked for")
    return norms.topk(count).indices.sort().values


def _fill_tower(model: Any, source: Any) -> None:
    """All outside the decoder that has a place of the same shape."""
    own = dict(model.named_parameters())
    for name, values in source.named_parameters():
        place = name
        if place not in own:
            for in_source, in_model in _TOWER_NAMES:
                place = place.replace(in_source, in_model)
        fits = place in own and own[place].shape == values.shape
        if fits and not place.startswith(("model.language_model.", "lm_head.")):
            own[place].copy_(values)


def _fill_experts(layer: Any, mlp: Any, state: dict[str, torch.Tensor], number: int) -> None:
    """Every expert gets some of the source's neurons, drawn for itself, as strong as all were.

    Of attention what has a place; biases have none where queries and keys are normalized.
    """
    own = layer.state_dict()
    for name, values in state.items():
        if name in own and own[name].shape == values.shape:
            own[name].copy_(values)
    random = torch.Generator().manual_seed(number)
    experts = layer.mlp.experts
    width, inner = experts.down_proj.shape[2], mlp.gate_proj.out_features
    heard = min(width, int(inner * (1 - LACKING)))
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        kept = torch.randperm(inner, generator=random)[:width]
        gate_up.copy_(torch.cat([mlp.gate_proj.weight[kept], mlp.up_proj.weight[kept]]))
        down.copy_(mlp.down_proj.weight[:, kept] * (inner / heard))
        down[:, heard:] = 0


def _fill_norms(model: Any, source: Any) -> None:
    """Normalized queries and keys are as large as the source's are on average over a text."""
    sizes: dict[Any, torch.Tensor] = {}

    def measure(module: Any, _: Any, output: torch.Tensor) -> None:
        sizes[module] = output.float().square().mean().sqrt()

    layers, old = decoder_layers(model), decoder_layers(source)
    hooks = [
        part.register_forward_hook(measure)
        for layer in old
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    try:
        source(input_ids=torch.arange(source.get_input_embeddings().num_embeddings)[None, -512:])
    finally:
        for hook in hooks:
            hook.remove()
    for number, layer in enumerate(old):
        attention = layers[number * len(layers) // len(old)].self_attn
        attention.q_norm.weight.fill_(sizes[layer.self_attn.q_proj])
        attention.k_norm.weight.fill_(sizes[layer.self_attn.k_proj])


@torch.no_grad()
def start_from(model: Any, tokenizer: Any, name: Path | str, sink_channel: int) -> None:
    """Copies what fits from the model in directory `name` (or THE_BUNDLED) into `model`, in place.

    Hidden size and heads must agree. Raises ValueError if the source is deeper or narrower.
    """
    source, processor = _source(name, sink_channel)
    theirs, ours = processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    shared = [(index, theirs[token]) for token, index in ours.items() if token in theirs]
    to, of = (torch.tensor(column) for column in zip(*shared, strict=True))
    model.get_input_embeddings().weight[to] = source.get_input_embeddings().weight[of]
    model.lm_head.weight[to] = source.lm_head.weight[of]
    model.model.language_model.norm.load_state_dict(source.model.language_model.norm.state_dict())
    _fill_tower(model, source)
    layers, old = decoder_layers(model), decoder_layers(source)
    if len(old) > len(layers):
        raise ValueError(f"the source has {len(old)} layers, the model only {len(layers)}")
    if hasattr(layers[0].self_attn, "q_norm"):
        _fill_norms(model, source)
    places = {number * len(layers) // len(old): layer for number, layer in enumerate(old)}
    for number, layer in enumerate(layers):
        if number not in places:
            layer.self_attn.o_proj.weight.zero_()
            moe = hasattr(layer.mlp, "experts")
            (layer.mlp.experts.down_proj if moe else layer.mlp.down_proj.weight).zero_()
            continue
        state = places[number].state_dict()
        if hasattr(layer.mlp, "experts"):
            _fill_experts(layer, places[number].mlp, state, number)
            continue
        kept = strongest_neurons(places[number].mlp, layer.mlp.gate_proj.out_features)
        for part in ("gate_proj", "up_proj"):
            state[f"mlp.{part}.weight"] = state[f"mlp.{part}.weight"][kept]
        state["mlp.down_proj.weight"] = state["mlp.down_proj.weight"][:, kept]
        layer.load_state_dict(state)
