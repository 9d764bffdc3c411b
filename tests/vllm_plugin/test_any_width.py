"""Widths that 128 does not divide, and an MLP padded for tensor parallelism, in vLLM on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_answers import (
    QUESTION,
    TOKENS,
    hugging_face_tokens,
    quantize_tiny,
    vllm_tokens,
)
from helpers.tiny_models import tiny_model

from qig_serve import transformers_plugin
from qig_serve.packing import fake_quantize_activation
from qig_serve.transformers_plugin import QuantizedInputLinear

pytest.importorskip("vllm")

from test_parallel import tokens as tokens_of_generate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NARROW = {
    "hidden_size": 160,
    "intermediate_size": 288,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""Inputs of qkv, o and gate_up 160, of down 288."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_shorter_last_group(scheme: str, dtype: str, tmp_path: Path, release: None) -> None:
    """Output head and embedding of w3a16 in 8 bits, too; bfloat16 takes the fast kernels."""
    source = tiny_model("llava", tmp_path / "source", **NARROW)
    checkpoint = quantize_tiny(source, tmp_path / scheme, scheme, method="qig+")
    found = vllm_tokens(checkpoint, dtype)
    assert hugging_face_tokens(checkpoint, dtype, found) == found


def of_two_ranks(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load_dequantized` of a model whose o and down have an int8 scale for each half of a token.

    vLLM's ranks quantize what they hold of it, as all its int8 methods do.
    """

    def loaded(*given: Any) -> Any:
        model = load(*given)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedInputLinear) and name.endswith(("o_proj", "down_proj")):
                module.forward = partial(by_halves, module)
        return model

    def by_halves(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        parts = [fake_quantize_activation(part) for part in x.chunk(2, -1)]
        return torch.nn.functional.linear(torch.cat(parts, -1), module.weight, module.bias)

    return loaded


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_two_ranks_share_a_padded_mlp(
    scheme: str, tmp_path: Path, release: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which they could not before; with the tokens of one rank, and of the MLP as it was."""
    source = tiny_model("llava", tmp_path / "source", intermediate_size=288)
    plain = quantize_tiny(source, tmp_path / "plain", scheme, pad_mlp=False)
    padded = quantize_tiny(source, tmp_path / "padded", scheme, pad_mlp=True)
    config = json.loads((padded / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 512
    calib = json.loads((tmp_path / "calib.jsonl").read_text())
    assert calib["messages"][0]["content"][1]["text"] == QUESTION
    body = {"messages": calib["messages"], "temperature": 0, "max_tokens": TOKENS}
    body |= {"ignore_eos": True, "return_token_ids": True}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    batch = tmp_path / "batch.jsonl"
    batch.write_text(json.dumps(line) + "\n")
    layout = ["--tensor-parallel-size", "2", "--enforce-eager"]
    shared = tokens_of_generate(padded, batch, tmp_path, *layout)["1"]
    assert vllm_tokens(plain) == hugging_face_tokens(padded)
    if scheme == "w4a8":
        loaded = of_two_ranks(transformers_plugin.load_dequantized)
        monkeypatch.setattr(transformers_plugin, "load_dequantized", loaded)
    assert shared == hugging_face_tokens(padded)
