"""--format compressed-tensors in vLLM without this package's plugin, against our own weights."""

from __future__ import annotations

import base64
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny_model
from PIL import Image

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = 12
QUESTION = "What color is the star?"


def _picture() -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    small = torch.randint(0, 256, (4, 7, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((112, 64), Image.Resampling.NEAREST)


def _messages() -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    _picture().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": content}]


def _quantize(source: Path, scheme: str, form: str) -> Path:
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    calib = source.parent / "calib.jsonl"
    calib.write_text(json.dumps({"messages": _messages(), "answer": "a large red star"}) + "\n")
    values = {"scheme": scheme, "method": "awq", "calib": str(calib), "samples": 1, "grid": 4}
    target = source.parent / f"{scheme}-{form}"
    quantize(source, target, make_recipe({**values, "format": form}), quiet=True)
    return target


def _load(directory: Path, dtype: torch.dtype) -> Any:
    """The model with our dequantized weights; its inputs stay in 16 bits, as in vLLM on a CPU."""
    from transformers import AutoModelForImageTextToText

    from qig_serve.transformers_plugin import QuantizedInputLinear, load_dequantized

    config = json.loads((directory / "config.json").read_text())
    if "quantization_config" not in config:
        return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
    model: Any = load_dequantized(directory, dtype)
    for module in model.modules():
        if isinstance(module, QuantizedInputLinear):
            module.__class__ = torch.nn.Linear
    return model


def _forced_logprobs(directory: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What a model in transformers gives to `tokens` as the answer."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text], images=[_picture()], add_special_tokens=False, return_tensors="pt"
    )
    start = inputs["input_ids"].shape[1]
    answer = torch.tensor([tokens])
    for name, fill in (("input_ids", answer), ("attention_mask", torch.ones_like(answer))):
        inputs[name] = torch.cat([inputs[name], fill], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(answer)], dim=1)
    with torch.no_grad():
        logits = _load(directory, dtype)(**inputs.to(dtype=dtype)).logits[0, start - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, answer[0, :, None])[:, 0]


@pytest.fixture
def release() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("family", sorted(f for f in FAMILIES if not f.endswith("_moe")))
def test_logprobs_within_noise(
    family: str, scheme: str, tmp_path: Path, release: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About as near to our weights in fp32 as transformers' own bf16 run of them is."""
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_PLUGINS", "")
    source = tiny_model(family, tmp_path / "source")
    # vLLM leaves the normalizing of pictures to a tower that does not do it (see patches.py).
    more = {"mm_device_do_normalize": False} if family == "exaone4_5" else {}
    llm = LLM(
        str(_quantize(source, scheme, "compressed-tensors")),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=2,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        seed=0,
        **more,
    )
    # No special tokens, which come first: a random model may well answer with images.
    parameters = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=1,
        allowed_token_ids=list(range(64, 320)),
    )
    ((answer,),) = [a.outputs for a in llm.chat([_messages()], parameters, use_tqdm=False)]
    del llm
    tokens = list(answer.token_ids)
    got = torch.tensor([s[t].logprob for s, t in zip(answer.logprobs, tokens, strict=True)])
    ours = _quantize(source, scheme, "qig")
    exact = _forced_logprobs(ours, tokens, torch.float32)
    half = _forced_logprobs(ours, tokens, torch.bfloat16)
    original = _forced_logprobs(source, tokens, torch.float32)
    error, noise, quantization = ((x - exact).abs().mean() for x in (got, half, original))
    print(
        f"{family} {scheme}: off by {error:.4f}; bf16 {noise:.4f}; unquantized {quantization:.4f}"
    )
    assert error < 2 * noise
    assert error < quantization / 3  # or any weights would pass
