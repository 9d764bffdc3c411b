"""qig checkpoints in plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llava
from safetensors.torch import load_file, save_file

from qig_serve import packing
from qig_serve.errors import UserError
from qig_serve.formats import get_scheme


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.build(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="module", params=["w3a16", "w4a8"])
def checkpoint(request: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint") / request.param
    return tiny_llava.quantize(source, target, request.param)


def _inputs(source: Path) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(text=[text], images=[tiny_llava.picture()], return_tensors="pt")


def test_from_pretrained_after_importing_the_plugin(source: Path, checkpoint: Path) -> None:
    """In a fresh process, as a user writes it; logits equal the reference's."""
    inputs = _inputs(source)
    with torch.no_grad():
        expected = tiny_llava.reference(source, checkpoint, torch.float32)(**inputs).logits
    torch.save(dict(inputs), checkpoint.parent / "inputs.pt")
    program = f"""
import qig_serve.transformers_plugin
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(checkpoint)!r}, dtype=torch.float32)
inputs = torch.load({str(checkpoint.parent / "inputs.pt")!r}, weights_only=True)
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, {str(checkpoint.parent / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=300)
    got = torch.load(checkpoint.parent / "logits.pt", weights_only=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_the_dequantized_ones(checkpoint: Path) -> None:
    from qig_serve.transformers_plugin import decoder_linears, load_dequantized

    model = load_dequantized(checkpoint, torch.bfloat16)
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    scheme = get_scheme(config["scheme"])
    linears = decoder_linears(model)
    assert len(linears) == 14
    for name, linear in linears.items():
        prefix = name.replace("model.language_model.", "language_model.model.") + "."
        parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        bias = parts.pop("bias", None)
        # Scales that are stored in fp32 must not have passed through bf16.
        expected = packing.unpack_linear(parts, scheme).to(torch.bfloat16)
        assert torch.equal(linear.weight, expected)
        assert (linear.bias is None) == (bias is None)


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    from qig_serve.transformers_plugin import load_dequantized

    checkpoint = tiny_llava.quantize(source, tmp_path / "c", "w3a16")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight_scale"):
        load_dequantized(checkpoint)


def test_an_unknown_version_is_refused(source: Path, tmp_path: Path) -> None:
    from qig_serve.transformers_plugin import load_dequantized

    checkpoint = tiny_llava.quantize(source, tmp_path / "c", "w3a16")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format_version 7"):
        load_dequantized(checkpoint)
