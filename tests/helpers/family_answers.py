"""A tiny model of a family, quantized and served; Hugging Face's answer with its weights."""

from __future__ import annotations

import base64
import gc
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

TOKENS = 12
QUESTION = "What color is the star?"
VOCABULARY_BITS = {"w3a16": 8, "w4a8": 16}
"""Of output head and embedding; Gemma's are tied."""


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


def quantize_tiny(source: Path, target: Path, scheme: str, **settings: Any) -> Path:
    """By the whole offline stage, smoothing included, on one sample; the checkpoint."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    calib = source.parent / "calib.jsonl"
    calib.write_text(json.dumps({"messages": _messages(), "answer": "a large red star"}) + "\n")
    wanted = {"scheme": scheme, "method": "awq", "calib": str(calib), "samples": 1}
    wanted |= dict.fromkeys(("head", "embeddings"), VOCABULARY_BITS[scheme]) | settings
    quantize(source, target, make_recipe(wanted), quiet=True)
    return target


def hugging_face_tokens(checkpoint: Path) -> list[int]:
    """Greedy tokens of plain transformers with the dequantized weights, in fp32."""
    from transformers import AutoProcessor

    from qig_serve.transformers_plugin import load_dequantized

    model: Any = load_dequantized(checkpoint, torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text], images=[_picture()], add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
    return list(out[0, inputs["input_ids"].shape[1] :].tolist())


def vllm_tokens(checkpoint: Path) -> list[int]:
    """Greedy tokens of vLLM, in this process and in fp32."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        seed=0,
    )
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = llm.chat([_messages()], parameters, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


def release_vllm() -> None:
    """Frees an engine of this process, one that did not start included."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
