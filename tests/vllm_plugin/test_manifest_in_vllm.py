"""vLLM reads `quantization_config` before the plugin does, and wants some fields to be objects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qig_serve.formats import FORMAT_VERSION
from qig_serve.manifest import CalibrationInfo, QuantizationConfig


def test_a_full_manifest_passes_through_vllm() -> None:
    """A field "producer" that is text kept every checkpoint of the pipeline from loading."""
    pytest.importorskip("vllm.config")  # first: vLLM's modules import each other
    convertor = pytest.importorskip("vllm.transformers_utils.model_arch_config_convertor")
    manifest = QuantizationConfig(
        quant_method="qig",
        format_version=FORMAT_VERSION,
        scheme="w4a8",
        bits=4,
        group_size=None,
        ignore=["lm_head"],
        method="qig",
        produced_by="qig-serve 0.1.0",
        calibration=CalibrationInfo(source="demo", samples=4, sha256="ab" * 32, seed=0),
        recipe={"scheme": "w4a8"},
        summary={"output_error": 0.1},
    ).model_dump(mode="json")
    base = convertor.ModelArchConfigConvertorBase
    config = SimpleNamespace(quantization_config=manifest)
    read = base._normalize_quantization_config(SimpleNamespace(), config)
    assert read["quant_method"] == "qig"
    assert read["produced_by"] == "qig-serve 0.1.0"
