"""Widths that 128 does not divide, and an MLP padded for tensor parallelism, in vLLM on a CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.family_answers import (
    QUESTION,
    TOKENS,
    hugging_face_tokens,
    quantize_tiny,
    release_vllm,
    vllm_tokens,
)
from helpers.tiny_models import tiny_model

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

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


@pytest.fixture
def release() -> Iterator[None]:
    yield
    release_vllm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_shorter_last_group(scheme: str, dtype: str, tmp_path: Path, release: None) -> None:
    """Output head and embedding of w3a16 in 8 bits, too; bfloat16 takes the fast kernels."""
    source = tiny_model("llava", tmp_path / "source", **NARROW)
    checkpoint = quantize_tiny(source, tmp_path / scheme, scheme, method="qig+")
    found = vllm_tokens(checkpoint, dtype)
    assert hugging_face_tokens(checkpoint, dtype, found) == found


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_two_ranks_share_a_padded_mlp(scheme: str, tmp_path: Path, release: None) -> None:
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
    assert shared == vllm_tokens(plain) == hugging_face_tokens(padded)
