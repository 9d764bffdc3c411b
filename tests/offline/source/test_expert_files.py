"""Experts as published files have them: fused either way round, or one tensor each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qig_serve.errors import UserError
from qig_serve.offline.source import loaded_model
from qig_serve.offline.source.tensors import SourceCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, torch.Tensor]
EXPERTS = "model.language_model.layers.1.mlp.experts."
FAMILIES = ("gemma4_moe", "glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {family: tiny_model(family, folder / family) for family in FAMILIES}


def changed(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def outputs_first(tensors: Tensors) -> None:
    """As transformers holds them: [E, out, in]."""
    for name in tensors:
        if "layers" in name and ".mlp.experts." in name and tensors[name].shape[1] in (256, 384):
            tensors[name] = tensors[name].transpose(1, 2)


def single(tensors: Tensors) -> None:
    """One tensor per expert and projection, in the blocks."""
    for name in list(tensors):
        owner, _, kind = name.rpartition(".")
        if not owner.startswith("model.") or not owner.endswith(".experts"):
            continue
        whole = tensors.pop(name)
        up = kind == "gate_up_proj"
        if whole.shape[2 if up else 1] != 256:  # the hidden size
            whole = whole.transpose(1, 2)
        for e, matrix in enumerate(whole):
            parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            for part, value in parts if up else [("down_proj", matrix)]:
                tensors[f"{owner}.{e}.{part}.weight"] = value.clone()


def blocks_of(directory: Path) -> Tensors:
    loaded = loaded_model.load(directory)
    return {
        f"{i}.{name}": parameter
        for i in range(loaded.num_blocks)
        for name, parameter in loaded.block(i).named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_the_same_model(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    expected = blocks_of(models[family])
    others = [single, *([outputs_first] if family == "qwen3_vl_moe" else [])]
    for change in others:
        found = blocks_of(changed(models[family], tmp_path / change.__name__, change))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_expert_is_read_of_the_file(models: dict[str, Path]) -> None:
    """Not the other 127: of each tensor no more bytes than it has, twice where it lies across."""
    path = models["qwen3_5_moe"]
    whole = load_file(path / "model.safetensors")
    loaded = loaded_model.load(path)
    for part, rows in (("gate_proj", slice(0, 384)), ("up_proj", slice(384, 768))):
        name = f"{EXPERTS}5.{part}.weight"
        assert loaded.source.shape(name) == (384, 256)
        assert torch.equal(loaded.source.tensor(name), whole[f"{EXPERTS}gate_up_proj"][5, rows])
    assert f"{EXPERTS}gate_up_proj" not in loaded.source
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in loaded.source  # stays as it is


def test_joined_is_what_the_file_has(models: dict[str, Path]) -> None:
    for path in models.values():
        whole = load_file(path / "model.safetensors")
        source = loaded_model.load(path).source
        joined = source.joined({name: source.tensor(name) for name in source})
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[name], whole[name]) for name in whole)
        assert set(SourceCheckpoint(path)) == set(whole)


def lose_an_expert(tensors: Tensors) -> None:
    single(tensors)
    del tensors[f"{EXPERTS}3.up_proj.weight"]


def fewer_experts(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}down_proj"] = tensors[f"{EXPERTS}down_proj"][:7]


def another_width(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}gate_up_proj"] = tensors[f"{EXPERTS}gate_up_proj"][:, :, :512]


def twice(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}0.down_proj.weight"] = torch.zeros(256, 384).bfloat16()


def a_bias(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}0.down_proj.bias"] = torch.zeros(256).bfloat16()


def nine(tensors: Tensors) -> None:
    single(tensors)
    tensors[f"{EXPERTS}8.down_proj.weight"] = torch.zeros(256, 384).bfloat16()


def no_router(tensors: Tensors) -> None:
    del tensors["model.language_model.layers.1.mlp.gate.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_an_expert, r"no tensor .*experts\.3\.up_proj\.weight"),
        (fewer_experts, r"experts\.down_proj is \[7, 384, 256\] .* asks for \[8, 256, 384\]"),
        (another_width, r"experts\.gate_up_proj is \[8, 256, 512\] .* asks for \[8, 768, 256\]"),
        (twice, r"by two names, .*experts\.0\.down_proj\.weight and inside of"),
        (a_bias, r"experts\.0\.down_proj\.bias in .* is a bias that config\.json does not know"),
        (nine, r"experts\.8\.down_proj\.weight in .* does not know"),
        (no_router, r"no tensor .*layers\.1\.mlp\.gate\.weight"),
    ],
)
def test_what_does_not_fit_is_said(
    models: dict[str, Path],
    tmp_path: Path,
    change: Callable[[Tensors], object],
    message: str,
) -> None:
    path = changed(models["qwen3_vl_moe"], tmp_path / "model", change)
    with pytest.raises(UserError, match=message) as caught:
        loaded_model.load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_expert_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}down_proj"][6, 1, 1] = float("nan")

    loaded = loaded_model.load(changed(models["qwen3_vl_moe"], tmp_path / "model", spoil))
    loaded.block(0)
    with pytest.raises(UserError, match=r"layer 1: .*experts\.6\.down_proj\.weight .* NaN"):
        loaded.block(1)


def test_a_router_that_transformers_does_not_compute(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(models["qwen3_vl_moe"], tmp_path / "model", lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["norm_topk_prob"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="norm_topk_prob in config.json is false, which vLLM"):
        loaded_model.load(path)
