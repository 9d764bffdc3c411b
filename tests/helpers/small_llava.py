"""A LLaVA of the demonstration's kind, small and random, with a GQA decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qig_serve.demo.model import ModelSpec, make_model, make_processor, save_model, train_tokenizer
from qig_serve.demo.questions import samples

SMALL = ModelSpec(
    name="tiny",
    family="llava",
    hidden=128,
    intermediate=256,
    layers=2,
    heads=4,
    kv_heads=2,
    vision_hidden=64,
    vision_heads=2,
    vision_layers=1,
    vision_intermediate=128,
    vocab_size=384,
    seed=20,
)

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]


def small_llava(directory: Path, change: Change | None = None) -> Path:
    """Writes the model: two blocks, 128 channels, 256 inside the MLP.

    `change` makes of a language model's parameter (its name, its value) another one.
    """
    tokenizer = train_tokenizer([f"{s.question} {s.answer}" for s in samples("train", 24)], 384)
    torch.manual_seed(0)
    model = make_model(SMALL, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "language_model" not in name:
            continue
        if "layers" in name and parameter.ndim == 2:
            k = parameter.shape[1]
            parameter.data = torch.randn(parameter.shape, generator=generator) / k**0.5
        if change is not None:
            parameter.data = change(name, parameter.data, generator)
    save_model(model, make_processor(SMALL, tokenizer), directory)
    return directory
