"""Every family with odd sources: a sentence before any work, none silent, no traceback.

What depends on a family's names or configuration is tried on all of them, what is the same code for
all on every fourth one, another four for each fault.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, row_of, tiny_model
from safetensors.torch import load_file, save_file

from qig_serve.architectures import ARCHITECTURES
from qig_serve.errors import UserError
from qig_serve.offline.source import loaded_model

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str, str], object]
"""Of the tensors; the name of a decoder linear and of a tensor of the vision tower."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_model(family, folder / family) for family in FAMILIES}


def beside(suffix: str) -> Change:
    """A companion of a decoder linear."""
    return lambda t, linear, _: t.update({f"{linear}.{suffix}": torch.ones(1)})


def stored(dtype: torch.dtype, tower: bool = False) -> Change:
    """A weight of another type."""

    def change(t: Tensors, linear: str, other: str) -> None:
        name = other if tower else f"{linear}.weight"
        t[name] = t[name].to(dtype)

    return change


def surplus_block(t: Tensors, linear: str, _: str) -> None:
    t[re.sub(r"\.layers\.\d\.", ".layers.77.", linear) + ".weight"] = torch.ones(1)


def lost_weight(t: Tensors, linear: str, _: str) -> None:
    del t[f"{linear}.weight"]


def lost_in_tower(t: Tensors, _: str, other: str) -> None:
    del t[other]


TENSORS: dict[str, Change] = {
    "weight_scale": beside("weight_scale"),
    "weight_scale_inv": beside("weight_scale_inv"),
    "SCB": beside("SCB"),
    "zero-point": beside("weight_zero_point"),
    "unknown": beside("levels"),
    "bias": beside("bias"),
    "int8": stored(torch.int8),
    "uint8": stored(torch.uint8),
    "float8": stored(torch.float8_e4m3fn),
    "float64": stored(torch.float64),
    "tower-int8": stored(torch.int8, tower=True),
    "tower-float8": stored(torch.float8_e5m2, tower=True),
    "tower-scale": lambda t, _, other: t.update({f"{other}_scale": torch.ones(1)}),
    "tower-unknown": lambda t, _, other: t.update({f"{other}x": torch.ones(1)}),
    "surplus-block": surplus_block,
    "lost-weight": lost_weight,
    "lost-in-tower": lost_in_tower,
}
CLAIMS: dict[str, tuple[str, Any]] = {
    "outer": ("config.json", {"quantization_config": {"quant_method": "awq"}}),
    "inner": ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
    "compression": ("config.json", {"compression_config": {"format": "int-quantized"}}),
    "modelopt": ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
}


OF_NAMES = ("unknown", "bias", "tower-unknown", "surplus-block", "lost-weight", "lost-in-tower")
"""Faults that are found by a family's own names."""


def some(faults: Iterable[str]) -> list[tuple[str, str]]:
    """Each fault with every fourth family, so that no family is left out."""
    return [
        (fault, family)
        for i, fault in enumerate(faults)
        for j, family in enumerate(FAMILIES)
        if (i + j) % 4 == 0
    ]


def refused(directory: Path) -> None:
    with pytest.raises(UserError) as caught:
        loaded_model.load(directory)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    assert any(word in text for word in ("give ", "download it again", "move "))


@pytest.mark.parametrize(
    ("fault", "family"),
    [*product(OF_NAMES, FAMILIES), *some(name for name in TENSORS if name not in OF_NAMES)],
)
def test_odd_tensors(models: dict[str, Path], tmp_path: Path, family: str, fault: str) -> None:
    directory = Path(shutil.copytree(models[family], tmp_path / family))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    groups = ARCHITECTURES[row_of(family)].groups  # the last linear that is not an expert's
    up = next(g.previous for g in reversed(groups) if g.kind != "norm" and "*" not in g.previous)
    ends = [f"layers.{i}.{up}.weight" for i in (0, 1)]  # the first block may have no experts
    linear = next(n for end in ends for n in tensors if n.endswith(end)).removesuffix(".weight")
    # PaddleOCR-VL's "packing" positions are read by nobody.
    tower = (n for n in sorted(tensors) if "vis" in n and "packing" not in n)
    other = next(n for n in tower if n.endswith("weight"))
    if fault == "bias" and f"{linear}.bias" in tensors:
        pytest.skip("the family has this bias")
    TENSORS[fault](tensors, linear, other)
    save_file(tensors, path, {"format": "pt"})
    refused(directory)


@pytest.mark.parametrize(("claim", "family"), some(CLAIMS))
def test_claims(models: dict[str, Path], tmp_path: Path, family: str, claim: str) -> None:
    directory = Path(shutil.copytree(models[family], tmp_path / family))
    name, value = CLAIMS[claim]
    path = directory / name
    config = json.loads(path.read_text()) if path.exists() else {}
    for key, part in value.items():
        config[key] = {**config.get(key, {}), **part}
    path.write_text(json.dumps(config))
    refused(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [-1, 1], ids=["fewer", "more"])
def test_blocks_in_config(
    models: dict[str, Path], tmp_path: Path, family: str, change: int
) -> None:
    directory = Path(shutil.copytree(models[family], tmp_path / family))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] += change
    if text.get("layer_types"):
        kinds = [*text["layer_types"], text["layer_types"][-1]]
        text["layer_types"] = kinds[: text["num_hidden_layers"]]
    if own := text.get("per_layer_config"):
        text["per_layer_config"] = {
            index: part for index, part in own.items() if int(index) < text["num_hidden_layers"]
        }
    path.write_text(json.dumps(config))
    refused(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_sets(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    directory = Path(shutil.copytree(models[family], tmp_path / family))
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(directory / "model.safetensors", directory / shard)
    index = {"weight_map": dict.fromkeys(load_file(directory / shard), shard)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory)
