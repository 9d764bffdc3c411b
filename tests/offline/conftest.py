"""A tiny LLaVA with a GQA decoder, and a few samples to calibrate it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qig_serve.demo.model import ModelSpec

TINY = ModelSpec(
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
)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory. Two blocks: 128 channels, 256 inside the MLP."""
    import torch

    from qig_serve.demo.model import make_model, make_processor, save_model, train_tokenizer
    from qig_serve.demo.questions import samples

    directory = tmp_path_factory.mktemp("tiny") / "model"
    corpus = [f"{s.question} {s.answer}" for s in samples("train", 24)]
    tokenizer = train_tokenizer(corpus, TINY.vocab_size)
    torch.manual_seed(0)
    model = make_model(TINY, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "language_model.layers" in name and parameter.ndim == 2:
            k = parameter.shape[1]
            parameter.data = torch.randn(parameter.shape, generator=generator) / k**0.5
    save_model(model, make_processor(TINY, tokenizer), directory)
    return directory


@pytest.fixture(scope="session")
def seven_samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL of seven questions with pictures."""
    from qig_serve.demo.questions import write_jsonl

    return str(write_jsonl("calibration", 7, tmp_path_factory.mktemp("calib")))
