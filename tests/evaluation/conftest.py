"""Two tiny models that differ a little: full precision and a noisy copy of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from qig_serve.demo import model as demo
    from qig_serve.demo import questions

    folder = tmp_path_factory.mktemp("twins")
    spec = dataclasses.replace(demo.get_spec("llava"), layers=2, vision_layers=1)
    corpus = [f"{s.question} {s.answer}" for s in questions.samples("train", 200)]
    tokenizer = demo.train_tokenizer(corpus, spec.vocab_size)
    spec = dataclasses.replace(spec, vocab_size=len(tokenizer))  # every token is a word
    processor = demo.make_processor(spec, tokenizer)
    model = demo.make_model(spec, tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():  # an untrained model is near uniform: sharpen it
        model.lm_head.weight.mul_(8)
        for name, weight in model.named_parameters():  # and make the prompt count
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                weight.mul_(6)
    demo.save_model(model, processor, folder / "full")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and "proj.weight" in name:
                weight.add_(torch.randn_like(weight) * 0.2 * weight.std())
    demo.save_model(model, processor, folder / "noisy")
    return folder / "full", folder / "noisy"
