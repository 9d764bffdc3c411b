"""Every family, round to nearest: plain transformers computes what the codes stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, one_sample, tiny_model

from qig_serve import packing
from qig_serve.architectures import get_architecture
from qig_serve.experts import unfuse
from qig_serve.formats import VOCABULARY_SCHEME, get_scheme
from qig_serve.inspection import require_sound
from qig_serve.manifest import read_quantization_config
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import METHODS, make_recipe

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEMES = ("w3a16", "w4a8")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reload")
    one_sample(directory)
    return tiny_model(request.param, directory / "source")


def cases() -> Iterator[tuple[str, str]]:
    """Every family in one scheme, those with experts in both; the slow test has all in both."""
    for index, family in enumerate(sorted(FAMILIES)):
        both = family.endswith("_moe")
        yield from ((family, scheme) for scheme in SCHEMES if both or scheme == SCHEMES[index % 2])


@pytest.mark.parametrize(("source", "scheme"), cases(), indirect=["source"])
def test_rtn_is_the_source_with_fake_quantized_weights(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    from transformers import AutoModelForImageTextToText

    from qig_serve.transformers_plugin import (
        QuantizedInputLinear,
        decoder_linears,
        load_dequantized,
    )

    checkpoint = tmp_path / scheme
    calib = str(source.parent / "calib.jsonl")
    options = {"scheme": scheme, "method": "rtn", "calib": calib, "samples": 1}
    quantize(source, checkpoint, make_recipe(options), quiet=True)
    got: Any = load_dequantized(checkpoint)
    original: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    unfuse(original)
    expected = dict(original.named_parameters())
    quantized = decoder_linears(got)
    arch = get_architecture(original.config.model_type)
    blocks = original.get_submodule(arch.decoder).layers
    assert len(quantized) == sum(len(g.linears) for b in blocks for g in arch.groups_of(b))
    form = get_scheme(scheme)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    tables = read_quantization_config(config, "config.json").eight_bit
    endings = tuple(f"{name.rpartition('.')[2]}.weight" for name in tables)
    assert endings or arch.embedding_as_is
    for name, parameter in got.named_parameters():
        weight = expected.pop(name)
        if endings and name.endswith(endings):
            weight = packing.fake_quantize(weight, VOCABULARY_SCHEME).to(weight.dtype)
        if name.removesuffix(".weight") in quantized:
            assert not torch.equal(parameter, weight)  # quantization does something
            stored = packing.scale_dtype(form, torch.bfloat16)
            weight = packing.fake_quantize(weight, form, stored)
        assert torch.equal(parameter, weight.float()), name
    assert not expected
    quantizes_inputs = {isinstance(m, QuantizedInputLinear) for m in quantized.values()}
    assert quantizes_inputs == {scheme == "w4a8"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(source: Path, tmp_path: Path, method: str, scheme: str) -> None:
    """The canary has read each back before it is published."""
    fields = {"calib": str(source.parent / "calib.jsonl"), "samples": 1, "grid": 3}
    recipe = make_recipe(fields | {"scheme": scheme, "method": method, "allow_fallbacks": True})
    quantize(source, tmp_path / "out", recipe, quiet=True)
    require_sound(tmp_path / "out")
