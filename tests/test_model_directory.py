"""What a model directory is: its config.json, its dtype, and whether it is one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qig_serve.errors import UserError
from qig_serve.model_directory import (
    load_config,
    model_dtype,
    quantization,
    read_config,
    read_manifest,
    text_config,
)


def write(directory: Path, config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, torch.float16),
        ({"dtype": None, "text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16),
        ({"text_config": {}, "vision_config": {"dtype": "torch.float16"}}, torch.float16),
        ({"dtype": "half"}, torch.float16),
        ({}, torch.float32),
    ],
    ids=["new", "older", "new-before-older", "decoder", "tower", "short", "none"],
)
def test_dtype_as_config_names_it(tmp_path: Path, config: Any, dtype: torch.dtype) -> None:
    assert model_dtype(write(tmp_path, config)) == dtype


def test_dtype_of_the_stored_tensors_where_config_names_none(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "llava"})
    ids = torch.zeros(2, dtype=torch.int64)
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "ids": ids}, tmp_path / "1.safetensors")
    assert model_dtype(tmp_path) == torch.bfloat16
    save_file({"p.weight_scale": torch.zeros(2, 1)}, tmp_path / "2.safetensors")
    assert model_dtype(tmp_path) == torch.bfloat16  # w4a8's scales are float32 in any model
    save_file({"b": torch.zeros(2)}, tmp_path / "3.safetensors")
    assert model_dtype(tmp_path) == torch.float32
    (tmp_path / "4.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"4\.safetensors is damaged"):
        model_dtype(tmp_path)


@pytest.mark.parametrize("name", ["int8", "nn", "no_such_dtype"])
def test_a_dtype_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"config\.json: '{name}' is not a dtype"):
        model_dtype(write(tmp_path, {"dtype": name}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a model directory: it has no config\.json"),
        (b"{", r"config\.json cannot be read: it is not JSON \(Expecting"),
        (b"\xff{}", r"config\.json, line 1, byte 1: 0xFF is not UTF-8"),
        (b"[" * 100_000, r"config\.json cannot be read: it is nested too deeply"),
        (b"[]", r"config\.json cannot be read: it is not a JSON object"),
    ],
    ids=["absent", "cut-short", "no-text", "deep", "list"],
)
def test_unreadable_config_is_one_sentence(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for reader in (read_config, load_config, model_dtype, quantization, read_manifest):
        with pytest.raises(UserError, match=message) as caught:
            reader(tmp_path)
        assert "\n" not in str(caught.value)


def test_no_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model directory .*/nowhere does not exist"):
        read_config(tmp_path / "nowhere")


def test_values_that_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is not a usable configuration: "):
        load_config(write(tmp_path, {"model_type": "llava", "text_config": 7}))


def test_defaults_of_the_class_are_filled_in(tmp_path: Path) -> None:
    """As in Gemma 3's published files, which leave the numbers of heads out."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560}
    write(tmp_path, {"model_type": "gemma3", "text_config": text})
    assert load_config(tmp_path).get_text_config().num_attention_heads == 8
    assert text_config(read_config(tmp_path)) == text


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": {"quant_method": "awq"}}, {"quantization_config": "qig"}],
    ids=["full-precision", "another-method", "no-object"],
)
def test_not_ours(tmp_path: Path, config: Any) -> None:
    assert quantization(write(tmp_path, config)) is None
    with pytest.raises(UserError, match="is not a qig checkpoint"):
        read_manifest(tmp_path)


def test_compressed_tensors_are_for_plain_vllm(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    with pytest.raises(UserError, match=f"vllm serve {tmp_path}$"):
        read_manifest(write(tmp_path, config))


def test_the_bundled_model_is_bfloat16() -> None:
    from qig_serve.demo import MODEL_DIR

    assert model_dtype(MODEL_DIR) == torch.bfloat16
