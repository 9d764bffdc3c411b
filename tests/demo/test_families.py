"""Every family: packed training sequences compute what the processor's own inputs do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from qig_serve.demo.batches import Encoder, answer_logits, make_batch
from qig_serve.demo.families import FAMILIES, get_family
from qig_serve.demo.family_row import IMAGE_TOKENS
from qig_serve.demo.model import (
    MODELS,
    load_model,
    make_model,
    make_processor,
    save_model,
    to_bfloat16,
    train_tokenizer,
)
from qig_serve.demo.questions import samples


@pytest.mark.parametrize("name", list(MODELS))
def test_family(name: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(MODELS[name], layers=2, vision_layers=2)
    asked = list(samples("train", 16))
    corpus = [f"{s.question} {s.answer}" for s in asked]
    tokenizer = train_tokenizer(corpus, spec.vocab_size, spec.family)
    model = to_bfloat16(make_model(spec, tokenizer)).eval()
    save_model(model, make_processor(spec, tokenizer), tmp_path)
    loaded, processor = load_model(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    model = loaded.float()
    encoder = Encoder(processor.tokenizer, spec.family)
    sample = asked[-1]  # a caption, the longest answer
    questions = [("count", "Hi?", "ok"), (sample.type, sample.question, sample.answer)]
    batch = make_batch(encoder, [np.asarray(sample.image)], [questions], torch.float32)
    with torch.no_grad():
        packed, image = answer_logits(model, batch, encoder.before_image)
    assert image.shape == (1, IMAGE_TOKENS, spec.hidden)
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    text += sample.answer + "<|im_end|>"
    inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
    reply = encoder.answer(sample.answer)
    ids = encoder.prefix + encoder.question(sample.question) + reply
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        alone = model(**inputs).logits[0, -len(reply) - 1 : -1]
    torch.testing.assert_close(packed[batch.question == 1], alone, rtol=1e-3, atol=1e-4)


def test_unknown_family_names_the_known_ones() -> None:
    assert {spec.family for spec in MODELS.values()} == set(FAMILIES)
    with pytest.raises(ValueError, match="known: llava, qwen2_vl"):
        get_family("clip")
