"""Models saved by today's transformers: written under the names by which vLLM loads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.saved_again import WAYS, save_again
from helpers.tiny_models import FAMILIES, one_sample, published_name, row_of, tiny_model
from safetensors.torch import load_file, save_file

from qig_serve.architectures import get_architecture
from qig_serve.cli import main
from qig_serve.model_directory import load_config, read_config
from qig_serve.offline.source.tensors import SourceCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def names(directory: Path) -> set[str]:
    source = SourceCheckpoint(directory)
    source.close()
    return set(source)


def fused(name: str) -> str:
    """The 3-D tensor that an expert's is part of: a checkpoint has single ones of either."""
    name = re.sub(r"(\.mlp\.experts\.)\d+\.(?:gate|up)_proj\.weight$", r"\1gate_up_proj", name)
    return re.sub(r"(\.mlp\.experts\.)\d+\.down_proj\.weight$", r"\1down_proj", name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_are_those_of_published_files(family: str, tmp_path: Path) -> None:
    published = tiny_model(family, tmp_path / "published")
    unread = set(FAMILIES[family].unread(load_config(published)))
    for way in WAYS:
        again = save_again(published, tmp_path / way, way)
        tower = read_config(again)["vision_config"].get("model_type")
        found = names(again)
        if way == "own-names":  # vLLM's mappers know `model.language_model.` and its like
            found = {published_name(family, name) for name in found}
        found = {fused(name) for name in found}
        served = {get_architecture(row_of(family)).served_name(name, tower) for name in found}
        assert served == {fused(name) for name in names(published)} - unread, way


def test_modules_that_vllm_names_otherwise(tmp_path: Path) -> None:
    """Gemma 4 without a tower, saved under its modules' names: as published, and quantized."""
    published = tiny_model("gemma4_unified", tmp_path / "published")
    again = save_again(published, tmp_path / "again", "own-names")
    assert any("multimodal_embedder" in name for name in names(again))
    out = tmp_path / "out"
    options = ["--calib", one_sample(tmp_path), "--method", "rtn", "--quiet"]
    assert main(["quantize", str(again), "--output", str(out), *options]) == 0
    assert {n for n in names(out) if "vision" in n} == {
        n for n in names(published) if "vision" in n
    }
    assert main(["inspect", str(out), "--verify"]) == 0


def test_other_towers_keep_their_names() -> None:
    for name in ("vision_tower.transformer.layers.0.attention.q_proj.weight", "lm_head.weight"):
        assert get_architecture("llava").served_name(name, "pixtral") == name


@pytest.mark.parametrize(
    ("way", "form"), [("built", "compressed-tensors"), ("built", "qig"), ("own-names", "qig")]
)
def test_the_checkpoint_has_them(way: str, form: str, tmp_path: Path) -> None:
    published = tiny_model("gemma3", tmp_path / "published")
    again = save_again(published, tmp_path / "again", way)
    out = tmp_path / "out"
    options = ["--calib", one_sample(tmp_path), "--method", "rtn", "--quiet", "--format", form]
    assert main(["quantize", str(again), "--output", str(out), *options]) == 0
    tower = {n for n in names(out) if "vision_tower" in n}
    prefix = "model." if way == "own-names" else ""
    assert tower == {prefix + n for n in names(published) if "vision_tower" in n}


def test_a_tensor_by_both_names_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llava", tmp_path / "llava")
    tensors = load_file(model / "model.safetensors")
    name = "vision_tower.vision_model.post_layernorm.bias"
    tensors[name.replace("vision_model.", "")] = torch.zeros_like(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = ["--output", str(tmp_path / "out"), "--quiet"]
    capsys.readouterr()
    assert main(["quantize", str(model), "--calib", one_sample(tmp_path), *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one tensor by two names" in line and name in line
