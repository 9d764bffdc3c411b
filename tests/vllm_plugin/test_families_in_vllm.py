"""Every family: quantize -> save -> reload in vLLM, against Hugging Face on the same checkpoint."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny_model
from PIL import Image

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# A model takes half a minute to load here; LLaVA is in the unmarked tests (test_in_vllm.py).
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = 12
NEAR = 0.4
"""Of the logits' standard deviation: what bfloat16 may change. Of another model it is 2 or 3."""
QUESTION = "What color is the star?"


def _picture() -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    small = torch.randint(0, 256, (4, 7, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((112, 64), Image.Resampling.NEAREST)


def _data_url() -> str:
    buffer = io.BytesIO()
    _picture().save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _messages() -> list[dict[str, Any]]:
    content = [
        {"type": "image_url", "image_url": {"url": _data_url()}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": content}]


def _quantize(source: Path, target: Path, scheme: str) -> Path:
    """By the whole offline stage, smoothing included, on one sample."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    calib = source.parent / "calib.jsonl"
    calib.write_text(json.dumps({"messages": _messages(), "answer": "a large red star"}) + "\n")
    recipe = make_recipe({"scheme": scheme, "method": "awq", "calib": str(calib), "samples": 1})
    quantize(source, target, recipe, quiet=True)
    return target


def _source(family: str, directory: Path) -> Path:
    """The family's tiny model, as far as vLLM on a CPU can compute it."""
    source = tiny_model(family, directory)
    config = json.loads((source / "config.json").read_text())
    config["text_config"].update(FAMILIES[family].cpu_text)
    (source / "config.json").write_text(json.dumps(config))
    return source


def _checked(checkpoint: Path, dtype: torch.dtype, tokens: list[int]) -> list[int]:
    """The greedy tokens of Hugging Face with the dequantized weights.

    In bfloat16 `tokens` themselves, if at every place Hugging Face likes them as much as its own
    choice but for rounding: then one near tie does not make all that follows another text.
    """
    from transformers import AutoProcessor

    from qig_serve.transformers_plugin import load_dequantized

    model: Any = load_dequantized(checkpoint, dtype)
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text], images=[_picture()], add_special_tokens=False, return_tensors="pt"
    )
    inputs = inputs.to(dtype)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
        if dtype == torch.float32:
            return list(out[0, length:].tolist())
        ids = torch.tensor([tokens])
        for name, fill in (("input_ids", ids), ("attention_mask", ids * 0 + 1)):
            inputs[name] = torch.cat([inputs[name], fill], 1)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], ids * 0], 1)
        logits = model(**inputs).logits[0, length - 1 : -1].float()
    behind = logits.max(-1).values - logits.gather(1, ids.T)[:, 0]
    assert behind.max() < NEAR * logits.std(), behind
    return tokens


@pytest.fixture
def release() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_equal(family: str, scheme: str, tmp_path: Path, release: None) -> None:
    from vllm import LLM, SamplingParams

    dtype = FAMILIES[family].cpu_dtype
    checkpoint = _quantize(_source(family, tmp_path / "source"), tmp_path / scheme, scheme)
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        max_model_len=512,
        max_num_seqs=2,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        seed=0,
    )
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = llm.chat([_messages()], parameters, use_tqdm=False)
    del llm
    tokens = list(answer.outputs[0].token_ids)
    assert _checked(checkpoint, getattr(torch, dtype), tokens) == tokens
