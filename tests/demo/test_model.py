"""The model specification: files as published, sequences as the processor makes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qig_serve.demo.batches import Encoder, answer_logits, make_batch
from qig_serve.demo.families import get_family
from qig_serve.demo.family_row import IMAGE_TOKENS
from qig_serve.demo.measure import answers_right, by_type, rounded_to_nearest
from qig_serve.demo.model import (
    MODELS,
    SUFFIX,
    get_spec,
    load_model,
    make_model,
    make_processor,
    published_name,
    question_prefix,
    save_model,
    to_bfloat16,
    train_tokenizer,
)
from qig_serve.demo.outliers import Outliers, activation_spread, add_outliers
from qig_serve.demo.questions import make_lesson, samples
from qig_serve.formats import get_scheme


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    spec = dataclasses.replace(get_spec("llava"), layers=2, vision_layers=2)
    corpus = [f"{s.question} {s.answer}" for s in samples("train", 200)]
    tokenizer = train_tokenizer(corpus, spec.vocab_size)
    model = to_bfloat16(make_model(spec, tokenizer)).eval()
    return model, make_processor(spec, tokenizer)


def _inputs(processor: Any, sample: Any) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = dict(processor(images=[sample.image], text=[text], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    return inputs


def test_specifications_fit_the_schemes() -> None:
    for name, spec in MODELS.items():
        assert spec.name == name
        assert spec.hidden % 128 == 0 and spec.intermediate % 128 == 0
        assert spec.heads % spec.kv_heads == 0 and spec.vocab_size % 128 == 0
    with pytest.raises(ValueError, match="known: llava"):
        get_spec("bert")


def test_saved_model_loads_with_its_own_logits(made: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = made
    save_model(model, processor, tmp_path)
    loaded, loaded_processor = load_model(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    sample = next(iter(samples("dev", 1)))
    inputs = _inputs(loaded_processor, sample)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_tensors_have_published_names(made: tuple[Any, Any], tmp_path: Path) -> None:
    save_model(*made, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
    for name in (
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    ):
        assert name in names
    with pytest.raises(ValueError, match="no published name"):
        published_name(get_family("llava"), "head.weight")


def test_chat_template(made: tuple[Any, Any]) -> None:
    processor = made[1]

    def render(messages: list[dict[str, Any]], generate: bool = True) -> str:
        return str(processor.apply_chat_template(messages, add_generation_prompt=generate))

    text = {"type": "text", "text": "Count the stars."}
    for image in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "a.png"}}):
        asked = render([{"role": "user", "content": [image, text]}])
        assert asked == question_prefix(get_family("llava")) + "Count the stars." + SUFFIX
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert render(turns, False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
    )


def test_any_text_survives_the_tokenizer(made: tuple[Any, Any]) -> None:
    tokenizer = made[1].tokenizer
    for text in ("a large red star", "Ünïcode, 漢字 and 🙂\n\ttabs", "x" * 50):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) <= 768


def test_training_sequences_are_the_processors(made: tuple[Any, Any]) -> None:
    processor = made[1]
    encoder = Encoder(processor.tokenizer)
    for sample in samples("dev", 8):
        inputs = _inputs(processor, sample)
        ids = encoder.prefix + encoder.question(sample.question)
        assert inputs["input_ids"][0].tolist() == ids
        assert ids.count(encoder.prefix[encoder.before_image]) == IMAGE_TOKENS
        batch = make_batch(
            encoder, [np.asarray(sample.image)], [[(sample.type, "?", "")]], torch.bfloat16
        )
        assert torch.equal(batch.pixels, inputs["pixel_values"])


def test_questions_that_share_a_picture_do_not_see_each_other(made: tuple[Any, Any]) -> None:
    model, processor = made
    model = model.float()
    encoder = Encoder(processor.tokenizer)
    lessons = [make_lesson(index) for index in range(2)]
    batch = make_batch(
        encoder, [x.pixels for x in lessons], [x.questions for x in lessons], torch.float32
    )
    with torch.no_grad():
        together, image = answer_logits(model, batch, encoder.before_image)
    assert image.shape == (2, IMAGE_TOKENS, model.config.text_config.hidden_size)
    number = 0
    for row, lesson in enumerate(lessons):
        for _, question, answer in lesson.questions:
            reply = encoder.answer(answer)
            ids = torch.tensor([encoder.prefix + encoder.question(question) + reply])
            with torch.no_grad():
                alone = model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits
            mine = batch.question == number
            assert batch.target[mine].tolist() == reply
            torch.testing.assert_close(
                together[mine], alone[0, -len(reply) - 1 : -1], rtol=1e-3, atol=1e-4
            )
            number += 1
    to_bfloat16(model)


def test_outliers_leave_every_logit_as_it_is(made: tuple[Any, Any]) -> None:
    import copy

    model, processor = made
    sample = next(iter(samples("dev", 1)))
    inputs = _inputs(processor, sample)
    uneven = copy.deepcopy(model)
    outliers = Outliers(norm_strength=32, up_strength=16, share=0.125)
    add_outliers(uneven, outliers, keep=(17,))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, uneven(**inputs).logits)
    ratio = (
        uneven.model.language_model.layers[0].input_layernorm.weight
        / model.model.language_model.layers[0].input_layernorm.weight
    )
    assert (ratio == 32).sum() == 32 and (ratio == 1).sum() == 224 and ratio[17] == 1
    before = model.model.language_model.layers[1].mlp.down_proj.weight
    after = uneven.model.language_model.layers[1].mlp.down_proj.weight
    assert ((before / after)[before[:, 0] != 0].nanmedian(0).values == 16).sum() == 96
    add_outliers(uneven, outliers.undo(), keep=(17,))
    ours, theirs = model.state_dict(), uneven.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="power of two"):
        Outliers(norm_strength=30)


def test_first_token_is_massive(made: tuple[Any, Any]) -> None:
    model, processor = made
    inputs = _inputs(processor, next(iter(samples("dev", 1))))
    for largest, median in activation_spread(model, inputs):
        assert largest > 20 * median


def test_rounding_changes_decoder_linears_only(made: tuple[Any, Any]) -> None:
    model, processor = made
    for name in ("w3a16", "w4a8"):
        rounded = rounded_to_nearest(model, get_scheme(name))
        for key, tensor in model.state_dict().items():
            linear = "language_model.layers" in key and key.endswith("proj.weight")
            assert torch.equal(tensor, rounded.state_dict()[key]) != linear, key
    asked = list(samples("dev", 16))
    right = answers_right(model, Encoder(processor.tokenizer), asked, chunk=5)
    assert len(right) == 16
    assert by_type(asked, right)["all"] == sum(right) / 16
