"""An MLP stored with channels of zeros: what is stored, what is said, and that nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import one_sample, tiny_model

from qig_serve import packing
from qig_serve.formats import SCHEMES, tensor_specs
from qig_serve.model_directory import load_config
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.source import loaded_model, mlp_width
from qig_serve.offline.source.mlp_padding import MlpPadding

UP, BOTH, DOWN = "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"


@pytest.mark.parametrize("name", ["w3a16", "w4a8"])
@pytest.mark.parametrize("width", [256, 288])
@pytest.mark.parametrize("linear", [UP, BOTH, DOWN, "self_attn.o_proj"])
def test_stored_zeros_stand_for_zeros(linear: str, width: int, name: str) -> None:
    """Also within a group that was not full; and what is read back is what there was."""
    scheme = SCHEMES[name]
    padding = MlpPadding(width, 1024, frozenset({UP, BOTH}), frozenset({DOWN}))
    n, k = {UP: (width, 160), BOTH: (2 * width, 160), DOWN: (7, width)}.get(linear, (7, 96))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero = packing.minmax_params(weight, scheme, torch.bfloat16)
    codes = packing.quantize(weight, scale, zero, scheme)
    parts = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
    plain = packing.unpack_linear(parts, scheme)
    stored = padding.packed(linear, parts, scheme)
    assert not bool((stored["weight_scale"] <= 0).any())
    wide = packing.unpack_linear(stored, scheme)
    for suffix, spec in tensor_specs(scheme, *wide.shape).items():
        assert tuple(stored[suffix].shape) == spec.shape
    more = 1024 - width
    expected = {
        UP: F.pad(plain, (0, 0, 0, more)),
        BOTH: torch.cat([F.pad(half, (0, 0, 0, more)) for half in plain.split(width)]),
        DOWN: F.pad(plain, (0, more)),
    }.get(linear, plain)
    assert torch.equal(wide, expected)
    assert torch.equal(padding.narrower(linear, wide), plain)


def test_where_the_width_stands_in_config_json() -> None:
    padding = MlpPadding(384, 512, frozenset(), frozenset())
    nested = {"text_config": {"intermediate_size": 384, "hidden_size": 64}, "model_type": "x"}
    wider = {"text_config": {"intermediate_size": 512, "hidden_size": 64}}
    assert padding.entries(nested) == wider
    assert padding.entries({"intermediate_size": 384, "hidden_size": 64}) == {
        "intermediate_size": 512
    }
    assert padding.entries({**nested, "intermediate_size": 384}) == {
        **wider, "intermediate_size": 512
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("narrow")
    one_sample(directory)
    return tiny_model("llava", directory / "source", intermediate_size=288)


def made(source: Path, target: Path, **settings: Any) -> Path:
    options = {"scheme": "w3a16", "method": "rtn", "calib": str(source.parent / "calib.jsonl")}
    quantize(source, target, make_recipe(options | {"samples": 1} | settings), quiet=True)
    return target


def test_a_padded_checkpoint_is_the_same_model(source: Path, tmp_path: Path) -> None:
    """Weights are the others and zeros; config.json, card, report and log say so."""
    from qig_serve.transformers_plugin import load_dequantized

    plain, padded = made(source, tmp_path / "plain"), made(source, tmp_path / "pad", pad_mlp=True)
    few, more = (json.loads((d / "config.json").read_text()) for d in (plain, padded))
    assert few["text_config"]["intermediate_size"] == 288
    assert more["text_config"]["intermediate_size"] == 512
    assert few["quantization_config"]["tensor_parallel_sizes"] == [1]
    assert more["quantization_config"]["tensor_parallel_sizes"] == [1, 2]
    assert more["quantization_config"]["summary"]["mlp_channels"] == 512
    assert "The MLP has 512 channels: 288 of the source's" in (padded / "README.md").read_text()
    assert "288 channels are stored with 224 of zeros" in (padded / "quantize.log").read_text()
    assert "zeros" not in (plain / "quantize.log").read_text()
    one: Any = load_dequantized(plain)
    two: Any = load_dequantized(padded)
    wide = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        expected = torch.zeros_like(wide[name])
        expected[tuple(slice(size) for size in parameter.shape)] = parameter
        assert torch.equal(wide[name], expected)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From blocks that lie padded on disk, to the bytes of a run that was not."""
    from qig_serve.offline import pipeline

    settings = {"method": "gptq", "pad_mlp": True}
    whole = made(source, tmp_path / "whole", **settings)
    write, written = pipeline.write_block, []

    def once(*arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    monkeypatch.setattr(pipeline, "write_block", once)
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "cut", **settings)
    monkeypatch.undo()
    options = {"scheme": "w3a16", "calib": str(source.parent / "calib.jsonl"), "samples": 1}
    recipe = make_recipe(options | settings)
    quantize(source, tmp_path / "cut", recipe, quiet=True, resume=True)
    for shard in whole.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes()


def test_who_is_padded(source: Path) -> None:
    """Those that have room for more devices, if large or asked for; by no more than that takes."""
    config = load_config(source)
    assert mlp_width.padded_width(config, SCHEMES["w3a16"]) == 512
    config.text_config.intermediate_size = 512
    assert mlp_width.padded_width(config, SCHEMES["w3a16"]) is None
    loaded: Any = loaded_model.load(source)
    loaded.source = ["mtp.fc.weight"]
    padding, note = mlp_width.choose(loaded, SCHEMES["w3a16"], True)
    assert padding is None and "multi-token" in note
