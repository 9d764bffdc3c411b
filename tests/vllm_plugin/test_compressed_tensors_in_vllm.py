"""--format compressed-tensors in vLLM without this package's plugin, against our own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_answers import TOKENS, asked, messages, quantize_tiny
from helpers.tiny_models import FAMILIES, tiny_model
from helpers.vllm_engine import engine

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def _quantize(source: Path, scheme: str, form: str) -> Path:
    target = source.parent / f"{scheme}-{form}"
    return quantize_tiny(source, target, scheme, format=form, grid=4, head=16, embeddings=16)


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
    inputs = asked(directory)
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


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("family", sorted(f for f in FAMILIES if not f.endswith("_moe")))
def test_logprobs_within_noise(
    family: str, scheme: str, tmp_path: Path, release: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About as near to our weights in fp32 as transformers' own bf16 run of them is."""
    from vllm import SamplingParams

    monkeypatch.setenv("VLLM_PLUGINS", "")
    source = tiny_model(family, tmp_path / "source")
    # vLLM leaves the normalizing of pictures to a tower that does not do it (see patches.py).
    more = {"mm_device_do_normalize": False} if family == "exaone4_5" else {}
    llm = engine(_quantize(source, scheme, "compressed-tensors"), dtype="bfloat16", **more)
    # No special tokens, which come first: a random model may well answer with images.
    parameters = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=1,
        allowed_token_ids=list(range(64, 320)),
    )
    ((answer,),) = [a.outputs for a in llm.chat([messages()], parameters, use_tqdm=False)]
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
