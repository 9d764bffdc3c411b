"""Which files hold the weights, and every place where a model says that it is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qig_serve.errors import UserError
from qig_serve.weight_files import check_full_precision, check_reference, weight_files

W = {"w": torch.zeros(2, 2)}


def write(directory: Path, config: Any = None, **files: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(config or {}))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def shards(directory: Path) -> None:
    save_file(W, directory / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_or_single_file(tmp_path: Path) -> None:
    write(tmp_path)
    shards(tmp_path)
    save_file(W, tmp_path / "consolidated.safetensors")  # no program looks at it
    assert weight_files(tmp_path).names == ["model-00001-of-00001.safetensors"]
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"consolidated\.safetensors, but neither"):
        weight_files(tmp_path)
    save_file(W, tmp_path / "model.safetensors")
    assert weight_files(tmp_path).names == ["model.safetensors"]


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    shards(tmp_path)
    save_file(W, tmp_path / "model.safetensors")
    for reader in (weight_files, check_reference):
        with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors and"):
            reader(tmp_path)


def test_a_file_that_only_transformers_reads(tmp_path: Path) -> None:
    write(tmp_path, {"transformers_weights": "other.safetensors"})
    save_file(W, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="transformers_weights names 'other"):
        weight_files(tmp_path)


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    write(tmp_path, adapter_config={"peft_type": "LORA"})
    save_file(W, tmp_path / "model.safetensors")
    weight_files(tmp_path)  # its description alone is left over
    save_file(W, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="merge it into the weights, or move it away"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("config", "files", "place"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, {}, "with awq .*: quantization_config"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, {}, "text_config.quantization_con"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, {}, "with gptq"),
        ({"thinker": {"llm": {"quantization_config": {"a": 1}}}}, {}, "thinker.llm.quantization"),
        ({"vision_config": {"quantization_config": {"a": 1}}}, {}, "vision_config.quantization"),
        ({"compression_config": {"format": "pack-quantized"}}, {}, r"json: compression_config"),
        ({}, {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}}, "hf_quant_config.json"),
        ({}, {"quantize_config": {"bits": 4}}, "quantize_config.json"),
        ({}, {"quant_config": {"w_bit": 4}}, "quant_config.json"),
    ],
)
def test_quantized_already(tmp_path: Path, config: Any, files: Any, place: str) -> None:
    write(tmp_path, config, **files)
    with pytest.raises(UserError, match="is quantized already.*" + place) as caught:
        check_full_precision(tmp_path)
    assert "give the full-precision model" in str(caught.value)


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"text_config": {"quantization_config": {}}}]
)
def test_full_precision(tmp_path: Path, config: Any) -> None:
    check_full_precision(write(tmp_path, config))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.weight", torch.zeros(2, 2, dtype=torch.int8), "is I8, and weights must be floating"),
        ("a.weight", torch.zeros(2, dtype=torch.float64), "is F64, and weights must be floating"),
        ("a.weight", torch.zeros(2).to(torch.float8_e4m3fn), "a.weight in .* stored in F8_E4M3"),
        ("a.weight_scale", torch.zeros(2), "quantized already: a.weight_scale in"),
        ("a.weight_scale_inv", torch.zeros(2), "part of a quantized weight"),
        ("a.SCB", torch.zeros(2), "part of a quantized weight"),
        ("a.input_scale", torch.zeros(2), "part of a quantized weight"),
        ("a.qzeros", torch.zeros(2, dtype=torch.int32), "part of a quantized weight"),
        ("a.weight_zero_point", torch.zeros(2), "part of a quantized weight"),
        ("a.position_ids", torch.zeros(2, dtype=torch.int64), None),
        ("a.logit_scale", torch.zeros(2), None),
    ],
)
def test_tensors_of_a_reference(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str | None
) -> None:
    write(tmp_path)
    save_file({name: tensor}, tmp_path / "model.safetensors")
    if message is None:
        check_reference(tmp_path)
        return
    with pytest.raises(UserError, match=message):
        check_reference(tmp_path)
