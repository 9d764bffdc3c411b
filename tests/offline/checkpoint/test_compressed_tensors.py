"""--format compressed-tensors: the library reads back the numbers of the qig checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, one_sample, tiny_model
from PIL import Image

from qig_serve.architectures import ARCHITECTURES
from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.formats import get_scheme
from qig_serve.inspection import verify
from qig_serve.manifest import read_quantization_config
from qig_serve.offline.checkpoint.compressed_tensors import (
    convert_linear,
    quantization_config,
    unsupported_shape,
)
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe
from qig_serve.packing import minmax_params, pack_linear, unpack_linear
from qig_serve.packing import quantize as quantize_weight

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")

SCHEMES = ("w3a16", "w4a8")
LEFT_ALONE = ["vision_tower", "multi_modal_projector", "language_model.lm_head"]


def test_a_shorter_last_group_has_no_such_form() -> None:
    """vLLM's compressed-tensors stops at it."""
    found = unsupported_shape(get_scheme("w3a16"), 576)
    assert found and "whole groups of 128" in found and "K=576" in found and "w4a8" in found
    assert unsupported_shape(get_scheme("w3a16"), 640) is None
    assert unsupported_shape(get_scheme("w4a8"), 576) is None


@pytest.mark.parametrize("n", [96, 20])  # 20: zero points do not fill their last word
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_decompresses_our_weights(scheme: str, n: int) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    form, arch = get_scheme(scheme), ARCHITECTURES["llava"]
    weight = torch.randn(n, 256, generator=torch.Generator().manual_seed(n))
    weight[0] += 5  # a range on one side of zero: the zero point is at an end
    scale, zero = minmax_params(weight, form)
    codes = quantize_weight(weight, scale, zero, form)
    stored = pack_linear(codes, scale, zero, form, torch.float32)
    config = QuantizationConfig.model_validate(quantization_config(arch, form, LEFT_ALONE))
    library = config.config_groups["group_0"]
    converted = convert_linear(stored, form)
    assert set(converted) == set(PackedQuantizationCompressor.compression_param_names(library))
    got = PackedQuantizationCompressor.decompress(converted, library)
    assert torch.equal(got["weight"], unpack_linear(stored, form))
    # And what the library itself would write of these numbers is what we wrote.
    if zero is not None:
        zero = (zero.to(torch.int16) - 8).to(torch.int8)
    plain = {"weight": got["weight"], "weight_scale": scale, "weight_zero_point": zero}
    theirs = PackedQuantizationCompressor.compress(plain, library)
    assert set(theirs) == set(converted)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in converted.items())


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(one_sample(tmp_path_factory.mktemp("calibration")))


def checkpoint(
    source: Path, output: Path, calibration: Path, scheme: str, form: str, **options: Any
) -> Path:
    values = {"scheme": scheme, "method": "rtn", "calib": str(calibration), "samples": 1}
    resume = options.pop("resume", False)
    recipe = make_recipe({**values, "format": form, **options})
    quantize(source, output, recipe, resume=resume, quiet=True)
    return output


def load_with_library(directory: Path) -> Any:
    """transformers' own way, in fp32."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return torch.nn.Module.float(model.eval())  # the packed weights wait for the first pass


def inputs_of(source: Path, calibration: Path) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    content = [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.open(calibration.parent / "red.png")
    return processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "llava" else pytest.mark.slow)
        for name in sorted(FAMILIES)
        if not name.endswith("_moe")  # experts are not written in this form
    ],
)
def test_transformers_loads_the_same_model(
    family: str, scheme: str, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qig_serve import transformers_plugin
    from qig_serve.transformers_plugin import decoder_linears, load_dequantized

    def as_the_library(x: torch.Tensor) -> torch.Tensor:
        """Its scale of a token is max |x| / 127.5, ours and vLLM's max |x| / 127."""
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127.5
        return ((x / scale).round().clamp(-128, 127) * scale).to(x.dtype)

    monkeypatch.setattr(transformers_plugin, "fake_quantize_activation", as_the_library)
    source = tiny_model(family, tmp_path / "source")
    in_16_bits = {"method": "awq", "grid": 2, "head": 16, "embeddings": 16}  # as this form has them
    ours, exported = (
        checkpoint(source, tmp_path / form, calibration, scheme, form, **in_16_bits)
        for form in ("qig", "compressed-tensors")
    )
    expected: Any = load_dequantized(ours)
    got = load_with_library(exported)
    inputs = inputs_of(source, calibration)
    with torch.no_grad():
        logits, wanted = got(**inputs).logits, expected(**inputs).logits
    values = dict(got.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(values[name], parameter), name
    quantized = {n for n, m in got.named_modules() if getattr(m, "quantization_scheme", None)}
    assert quantized == set(decoder_linears(expected))
    assert torch.equal(logits, wanted)


def test_what_is_published(calibration: Path, tmp_path: Path) -> None:
    source = tiny_model("llava", tmp_path / "source")
    directory = checkpoint(source, tmp_path / "ct", calibration, "w3a16", "compressed-tensors")
    assert verify(directory) == []
    assert not list(directory.glob("block-*")) and not list(directory.glob("compressed-*"))
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    ours = read_quantization_config(config["qig"], "config.json")
    assert (ours.scheme, ours.bits, ours.recipe["format"]) == ("w3a16", 3, "compressed-tensors")
    card = (directory / "README.md").read_text()
    assert "vLLM loads as it comes" in card and "qig-serve serve" not in card
    assert card.count("vllm serve") == 1


def test_a_run_killed_while_it_published_is_resumed(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qig_serve.offline import pipeline
    from qig_serve.offline.checkpoint import writer as module

    source = tiny_model("llava", tmp_path / "source")
    for form in ("qig", "compressed-tensors"):
        expected = checkpoint(source, tmp_path / form, calibration, "w4a8", form)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_hashes", killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint(source, tmp_path / "again", calibration, "w4a8", form)
        with monkeypatch.context() as patch:  # nothing is computed twice
            patch.setattr(pipeline, "round_block", killed)
            checkpoint(source, tmp_path / "again", calibration, "w4a8", form, resume=True)
        for path in sorted(expected.glob("*.safetensors")):
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
        names = {p.name for p in expected.iterdir()}
        assert names == {p.name for p in (tmp_path / "again").iterdir()}
        (tmp_path / "again").rename(tmp_path / f"again-{form}")


def test_the_flag_is_the_recipe_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "m", "--format", "compressed-tensors", "--print-recipe"]) == 0
    assert "format: compressed-tensors" in capsys.readouterr().out
    with pytest.raises(UserError, match="format: Input should be 'qig' or 'compressed-tensors'"):
        make_recipe({"format": "gguf"})


def test_no_evaluation_of_what_cannot_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["quantize", "m", "--output", str(output), "--format", "compressed-tensors"]
    assert main([*command, "--evaluate", "demo"]) == 2
    assert "--evaluate cannot read the form compressed-tensors" in capsys.readouterr().err


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_names_in_transformers_and_in_vllm(family: str) -> None:
    """The pattern names the decoder's linears under each library's names, and nothing else."""
    import re

    arch = ARCHITECTURES[family]
    config = quantization_config(arch, get_scheme("w3a16"), LEFT_ALONE)
    (target,) = config["config_groups"]["group_0"]["targets"]
    pattern = re.compile(target.removeprefix("re:"))
    ignored = [re.compile(name.removeprefix("re:")) for name in config["ignore"]]
    text = arch.decoder.rpartition(".")[2]
    for prefix in (f"{arch.decoder}.layers.3", f"{text}.model.layers.3"):
        for linear in arch.linears:
            assert pattern.match(f"{prefix}.{linear}")
            assert not any(p.match(f"{prefix}.{linear}") for p in ignored)
        assert not pattern.match(f"{prefix}.self_attn.q_norm")
    for other in (
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "multi_modal_projector.linear_1",
        "lm_head",
        "language_model.lm_head",
    ):
        assert not pattern.match(other)
        assert any(p.match(other) for p in ignored)
