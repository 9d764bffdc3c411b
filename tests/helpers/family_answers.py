"""A tiny model of a family, quantized and served; Hugging Face's answer with its weights."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from helpers.tiny_models import FAMILIES
from helpers.vllm_engine import engine

TOKENS = 12
NEAR = 0.4
"""Of the logits' standard deviation: what bfloat16 may change. Of another model it is 2 or 3."""
TIE = 0.05
"""Of the router logits' standard deviation: between an expert that is chosen and one that is not,
what bfloat16 may turn round, also by an 8-bit code. Then the token's numbers are another expert's;
Hugging Face's own in float32 and in bfloat16 differ so."""
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


def messages() -> list[dict[str, Any]]:
    """A question about a picture, which is in it as a data URL."""
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
    calib.write_text(json.dumps({"messages": messages(), "answer": "a large red star"}) + "\n")
    wanted = {"scheme": scheme, "method": "awq", "calib": str(calib), "samples": 1}
    wanted |= dict.fromkeys(("head", "embeddings"), VOCABULARY_BITS[scheme]) | settings
    quantize(source, target, make_recipe(wanted), quiet=True)
    return target


def as_vllm_computes_it(source: Path, family: str) -> Path:
    """The family's tiny model, as far as vLLM on a CPU can compute it."""
    config = json.loads((source / "config.json").read_text())
    config["text_config"].update(FAMILIES[family].cpu_text)
    (source / "config.json").write_text(json.dumps(config))
    return source


def asked(directory: Path) -> Any:
    """The question about the picture as a model's processor in transformers has it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(
        text=[text], images=[_picture()], add_special_tokens=False, return_tensors="pt"
    )


def hugging_face_tokens(
    checkpoint: Path, dtype: str = "float32", tokens: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens of plain transformers with the dequantized weights.

    In bfloat16, and where Gemma 4's experts get int8 inputs, `tokens` themselves, if at every place
    Hugging Face likes them as much as its own choice but for rounding: then one near tie does not
    make all that follows another text. Places where a router is as good as undecided do not count;
    a quarter of them has to. (Changed by 1e-6, the input of the tiny Gemma 4's blocks turns int8
    codes, and these routers: transformers' own logits then move by 0.9 standard deviations.)
    """

    from qig_serve.model_directory import read_manifest
    from qig_serve.transformers_plugin import load_dequantized

    model: Any = load_dequantized(checkpoint, getattr(torch, dtype))
    inputs = asked(checkpoint).to(getattr(torch, dtype))
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
        greedy: list[int] = out[0, length:].tolist()
        margins = _router_margins(model)
        int8 = read_manifest(checkpoint).quant_scheme.activation_bits is not None
        jumps = int8 and margins is not None and model.config.model_type == "gemma4"
        exact = dtype == "float32" and not (jumps and tokens)
        if exact or greedy == list(tokens):
            return greedy
        ids = torch.tensor([list(tokens)])
        for name, fill in (("input_ids", ids), ("attention_mask", ids * 0 + 1)):
            inputs[name] = torch.cat([inputs[name], fill], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], ids * 0], 1)
        logits = model(**inputs).logits[0, length - 1 : -1].float()
    behind = logits.max(-1).values - logits.gather(1, ids.T)[:, 0]
    if margins is not None:
        decided = torch.stack(margins).amin(0)[length - 1 : -1] > TIE
        assert decided.sum() >= len(tokens) / 4, f"near ties: only {decided.sum()} tokens decide"
        behind = behind[decided]
    assert behind.max() < NEAR * logits.std(), behind
    return list(tokens)


def _router_margins(model: Any) -> list[torch.Tensor] | None:
    """Filled by the next forward: each router's margin, by token, in standard deviations.

    Times half the experts of a token: of many, the one that is exchanged for another counts less.
    None without experts.
    """
    from qig_serve.architectures import get_architecture

    found: list[torch.Tensor] = []
    text = model.config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)

    def note(router: Any, inputs: Any, output: Any) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        logits = torch.nn.functional.linear(hidden, router.weight).float()
        best = logits.topk(top_k + 1).values
        found.append((best[:, -2] - best[:, -1]) / logits.std() * top_k / 2)

    arch = get_architecture(model.config.model_type)
    router = arch.kept[0] if any("*" in name for name in arch.linears) else ""
    modules = [m for n, m in model.named_modules() if router and n.endswith(f".{router}")]
    for module in modules:
        module.register_forward_hook(note)
    return found if modules else None


def vllm_tokens(checkpoint: Path, dtype: str = "float32") -> list[int]:
    """Greedy tokens of vLLM, in this process."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = engine(checkpoint, dtype=dtype).chat([messages()], parameters, use_tqdm=False)
    return list(answer.outputs[0].token_ids)
