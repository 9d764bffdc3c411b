"""A tiny model with experts before its first block, and a few samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from helpers.tiny_models import tiny_model
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.calibration.sources import load_calibration
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.pipeline import first_streams
from qig_serve.offline.recipe import QuantRecipe, make_recipe
from qig_serve.offline.source.loaded_model import LoadedModel, load


def several_samples(directory: Path) -> str:
    """A JSONL of questions of several lengths about pictures in several colours; its path."""
    lines = []
    for i in range(4):
        Image.new("RGB", (56, 56), (40 * i, 255 - 50 * i, 90)).save(directory / f"{i}.png")
        text = "What color is the star? Describe it. " * (2 + i)
        content = [{"type": "image_url", "image_url": {"url": f"{i}.png"}}]
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        lines.append({"id": str(i), "messages": messages, "answer": "a large red star"})
    path = directory / "calib.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def streams_of(
    directory: Path, family: str = "qwen3_vl_moe", **fields: Any
) -> tuple[LoadedModel, Streams, QuantRecipe]:
    """The model, made in `directory` unless it is there; both streams before block 0."""
    model = directory / family
    if not model.exists():
        tiny_model(family, model)
    calib = several_samples(directory)
    recipe = make_recipe({"calib": calib, "samples": 4, "grid": 4, "device": "cpu", **fields})
    loaded = load(model)
    samples = load_calibration(calib, 4, 0)
    batches = make_batches(samples, loaded.processor, loaded.image_token_id)
    torch.manual_seed(0)
    return loaded, first_streams(loaded, recipe, batches, None), recipe
