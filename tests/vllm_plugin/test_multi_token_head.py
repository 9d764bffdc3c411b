"""Qwen3.5's multi-token head beside a quantized decoder: in 16 bits, and what may speculate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_models import one_sample, tiny_model
from safetensors.torch import load_file

pytest.importorskip("vllm")

from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe
from qig_serve.vllm_plugin.config import QigConfig, refuse_speculation

pytestmark = pytest.mark.filterwarnings("ignore")

KEY = "quantization_config"


def quantized(family: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a tiny model, and of its checkpoint in `folder`/out."""
    source, calib = tiny_model(family, folder / "source"), one_sample(folder)
    recipe = make_recipe({"scheme": "w3a16", "method": "rtn", "calib": calib, "samples": 1})
    quantize(source, folder / "out", recipe, quiet=True)
    tensors: dict[str, Any] = {}
    for shard in (folder / "out").glob("*.safetensors"):
        tensors |= load_file(shard)
    return load_file(source / "model.safetensors"), tensors


def test_the_head_and_small_projections_stay_in_16_bits(tmp_path: Path) -> None:
    """Under the names that vLLM's modules have, fused ones included."""
    before, tensors = quantized("qwen3_5", tmp_path)
    heads = [name for name in before if name.startswith("mtp.")]
    assert len(heads) > 10 and all(tensors[name].equal(before[name]) for name in heads)

    manifest = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "mtp" in manifest["ignore"]
    config = QigConfig(manifest)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
        "in_proj_ba": ["in_proj_b", "in_proj_a"],
    }
    for module in ("fc", "layers.0.self_attn.qkv_proj", "layers.0.mlp.gate_up_proj"):
        assert config.is_ignored(f"mtp.{module}")
    layer = "model.language_model.layers.0"
    assert config.is_ignored(f"{layer}.linear_attn.in_proj_ba")
    for module in ("linear_attn.in_proj_qkvz", "linear_attn.out_proj", "mlp.gate_up_proj"):
        assert not config.is_ignored(f"{layer}.{module}")


def test_a_block_behind_the_last_stays_in_16_bits(tmp_path: Path) -> None:
    """GLM-OCR's, which is a model of its own in vLLM, by another name."""
    before, tensors = quantized("glm_ocr", tmp_path)
    behind = [name for name in before if ".layers.2." in name]
    assert len(behind) > 10 and all(tensors[name].equal(before[name]) for name in behind)

    config = QigConfig(json.loads((tmp_path / "out" / "config.json").read_text())[KEY])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert config.is_ignored("model.layers.2.self_attn.qkv_proj")
    assert not config.is_ignored("language_model.model.layers.1.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("types", "speculative", "refused"),
    [
        (["linear_attention", "full_attention"], object(), True),
        (["linear_attention", "full_attention"], None, False),
        (["full_attention"], object(), False),
        (None, object(), False),
    ],
    ids=["refused", "no-speculator", "attention-alone", "unlisted"],
)
def test_speculation_with_gated_delta_net_on_a_cpu(
    types: Any, speculative: Any, refused: bool
) -> None:
    model = SimpleNamespace(hf_text_config=SimpleNamespace(layer_types=types))
    config = SimpleNamespace(speculative_config=speculative, model_config=model)
    if not refused:
        refuse_speculation(config)
        return
    with pytest.raises(ValueError, match="leave --speculative-config out"):
        refuse_speculation(config)
