"""The bundled model: small, complete, good at its questions, and hurt by plain rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.batches import Encoder
from qig_serve.demo.families import get_family
from qig_serve.demo.measure import answers_right, by_type, rounded_to_nearest
from qig_serve.demo.model import get_spec, load_model
from qig_serve.demo.outliers import Outliers, activation_spread, add_outliers
from qig_serve.demo.questions import TYPES, Question, samples
from qig_serve.formats import get_scheme

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return load_model(MODEL_DIR)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return list(samples("dev", 240))


def test_it_is_complete_and_small() -> None:
    assert {path.name for path in MODEL_DIR.iterdir()} == FILES
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 16_000_000


def test_it_is_what_the_specification_says(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    expected = get_family("llava").make_config(get_spec("llava"), processor.tokenizer)
    for part in ("text_config", "vision_config"):
        theirs = getattr(model.config, part).to_dict()
        for key, value in getattr(expected, part).to_dict().items():
            assert key in ("dtype", "transformers_version") or theirs[key] == value, key
    config = json.loads((MODEL_DIR / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"


def test_it_loads_every_tensor() -> None:
    _, report = AutoModelForImageTextToText.from_pretrained(
        MODEL_DIR, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_its_greedy_answers_are_what_the_evaluator_says(
    bundled: tuple[Any, Any], asked: list[Question]
) -> None:
    model, processor = bundled
    part = asked[:16]
    right = answers_right(model, Encoder(processor.tokenizer), part)
    for sample, expected in zip(part, right, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=96)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert (answer == sample.answer) == expected, (sample.question, answer)


def test_it_answers_and_rounding_hurts(bundled: tuple[Any, Any], asked: list[Question]) -> None:
    model, processor = bundled
    encoder = Encoder(processor.tokenizer)
    full = by_type(asked, answers_right(model, encoder, asked))
    assert full["all"] >= 0.86 and all(full[kind] > 0.5 for kind in TYPES)
    for name in ("w3a16", "w4a8"):
        rounded = rounded_to_nearest(model, get_scheme(name))
        scores = by_type(asked, answers_right(rounded, encoder, asked))
        assert scores["all"] < full["all"] - 0.02 or scores["caption"] < full["caption"] - 0.08


def test_its_channel_outliers_come_out_again(bundled: tuple[Any, Any]) -> None:
    model, _ = load_model(MODEL_DIR)
    layer = model.model.language_model.layers[0]
    uneven = layer.input_layernorm.weight.float().abs()
    add_outliers(model, Outliers().undo(), keep=(get_spec("llava").sink_channel,))
    even = layer.input_layernorm.weight.float().abs()
    assert (uneven / even > 1).sum() == 32
    sample = next(iter(samples("dev", 1)))
    pixels = torch.from_numpy(np.asarray(sample.image).copy()).permute(2, 0, 1)[None]
    encoder = Encoder(bundled[1].tokenizer)
    ids = torch.tensor([encoder.prefix + encoder.question(sample.question)])
    inputs = {"input_ids": ids, "pixel_values": (pixels / 127.5 - 1).to(torch.bfloat16)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bundled[0](**inputs).logits)
    for largest, median in activation_spread(model, inputs)[:-1]:  # the last is normalized
        assert largest > 10 * median


def test_the_package_names_its_folder() -> None:
    assert (Path(MODEL_DIR) / "config.json").is_file()
