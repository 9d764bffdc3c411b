"""Checkpoints that are damaged or not what they claim: one sentence, before memory is taken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llava
from helpers.damage import change_header, change_index, flip_bit, huge_header
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.inspection import inspect, require_sound, verify
from qig_serve.model_directory import INDEX_FILE
from qig_serve.offline.disk import write_hashes

DOWN = "language_model.model.layers.1.mlp.down_proj"
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each scheme, with an index and a manifest."""
    folder = tmp_path_factory.mktemp("tiny")
    source = tiny_llava.build(folder / "source")
    made = {}
    for scheme in ("w3a16", "w4a8"):
        made[scheme] = tiny_llava.quantize(source, folder / scheme, scheme)
        names = load_file(made[scheme] / SHARD)
        index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), SHARD)}
        (made[scheme] / INDEX_FILE).write_text(json.dumps(index))
        config_of(made[scheme], claim)
        write_hashes(made[scheme])
    return made


@pytest.fixture
def checkpoint(intact: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact["w3a16"], tmp_path / "w3a16"))


def claim(config: dict[str, Any]) -> None:
    names = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    config["quantization_config"] |= names


def config_of(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def manifest(**values: Any) -> Callable[[Path], None]:
    """A damage: fields of quantization_config changed."""
    return lambda d: config_of(d, lambda c: c["quantization_config"].update(values))


def model(**values: Any) -> Callable[[Path], None]:
    """A damage: fields of config.json changed."""
    return lambda d: config_of(d, lambda c: c.update(values))


def text(**values: Any) -> Callable[[Path], None]:
    """A damage: fields of the decoder's configuration changed."""
    return lambda d: config_of(d, lambda c: c["text_config"].update(values))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], indexed: bool = True) -> Any:
    """A damage: tensors of the shard changed, and the index with them if `indexed`."""

    def damage(directory: Path) -> None:
        found = load_file(directory / SHARD)
        change(found)
        save_file(found, directory / SHARD, {"format": "pt"})
        if indexed:
            change_index(directory, lambda m: (m.clear(), m.update(dict.fromkeys(found, SHARD))))

    return damage


def overlapping(header: dict[str, Any]) -> None:
    first, second = sorted(n for n in header if n != "__metadata__")[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def twice(directory: Path) -> None:
    shutil.copy(directory / SHARD, directory / "other.safetensors")


def renamed(found: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [n for n in found if n.startswith(old)]:
        found[name.replace(old, new, 1)] = found.pop(name)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "format-version": (manifest(format_version=2), "format_version 2 is not supported"),
    "scheme": (manifest(scheme="w5a5"), "unknown scheme 'w5a5'"),
    "stress-scheme": (
        manifest(scheme="w2a16", bits=2),
        "unknown scheme 'w2a16'",
    ),
    "bits": (manifest(bits=4), "bits=3, .*but the checkpoint says bits=4"),
    "group-size": (manifest(group_size=64), "the checkpoint says .*group_size=64"),
    "other-scheme": (
        manifest(scheme="w4a8", bits=4, group_size=None),
        "weight_zero_point: w4a8 stores no|weight_scale: BF16 .* but w4a8 needs F32",
    ),
    "unknown-field": (manifest(code="print()"), "code"),
    "method-of-another": (manifest(quant_method="gptq"), "not a qig checkpoint"),
    "ignore-nothing": (manifest(ignore=[]), "nor listed in the manifest as left in 16 bits"),
    "ignore-quantized": (
        lambda d: config_of(d, lambda c: c["quantization_config"]["ignore"].append(DOWN)),
        f"{DOWN}: quantized, but listed",
    ),
    "ignore-absent": (
        lambda d: config_of(d, lambda c: c["quantization_config"]["ignore"].append("tower")),
        "tower: listed as left in 16 bits, but no tensor",
    ),
    "scale-dtype": (
        tensors(lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].int()})),
        f"{DOWN}.weight_scale: I32",
    ),
    "scale-shape": (
        tensors(
            lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"][:, :1].clone()})
        ),
        f"{DOWN}.weight_scale: BF16",
    ),
    "zero-point-dtype": (
        tensors(
            lambda t: t.update(
                {f"{DOWN}.weight_zero_point": t[f"{DOWN}.weight_zero_point"].short()}
            )
        ),
        f"{DOWN}.weight_zero_point: I16",
    ),
    "zero-point-shape": (
        tensors(
            lambda t: t.update(
                {f"{DOWN}.weight_zero_point": t[f"{DOWN}.weight_zero_point"].T.contiguous()}
            )
        ),
        f"{DOWN}.weight_zero_point: U8",
    ),
    "packed-dtype": (
        tensors(lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"].long()})),
        f"{DOWN}.weight_packed: I64",
    ),
    "packed-shape": (
        tensors(
            lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"][:-1].clone()})
        ),
        f"{DOWN}.weight_scale: BF16|{DOWN}: .* but config.json asks",
    ),
    "packed-columns": (
        tensors(
            lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"][:, 1:].clone()})
        ),
        f"{DOWN}.weight_packed",
    ),
    "no-scale": (tensors(lambda t: t.pop(f"{DOWN}.weight_scale")), f"{DOWN}.weight_scale: missing"),
    "no-packed": (
        tensors(lambda t: t.pop(f"{DOWN}.weight_packed")),
        f"there is no {DOWN}.weight_packed beside it",
    ),
    "no-linear": (
        tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith(DOWN)]),
        "decoder block 1 has no mlp.down_proj.weight_packed",
    ),
    "no-norm": (
        tensors(lambda t: t.pop("language_model.model.layers.1.input_layernorm.weight")),
        "decoder block 1 has no input_layernorm.weight",
    ),
    "no-block": (
        tensors(lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n and "language" in n]),
        "num_hidden_layers is 2, but the blocks stored are 0 to 0",
    ),
    "extra-weight": (
        tensors(lambda t: t.update({f"{DOWN}.weight": torch.zeros(2, 2)})),
        f"{DOWN}.weight: w3a16 stores no such tensor",
    ),
    "extra-linear": (
        tensors(lambda t: renamed(t, DOWN, DOWN.replace("down", "sideways"))),
        "decoder block 0 has no mlp.sideways_proj|decoder block 1 has no mlp.down_proj",
    ),
    "extra-tensor": (
        tensors(lambda t: t.update({"spare.weight": torch.zeros(2, 2)})),
        "spare.weight: neither in a decoder block nor",
    ),
    "not-in-index": (
        tensors(lambda t: t.update({"spare.weight": torch.zeros(2, 2)}), indexed=False),
        "spare.weight: in model.safetensors, but not in",
    ),
    "not-in-shard": (
        tensors(lambda t: t.pop(f"{DOWN}.weight_scale"), indexed=False),
        f"names the tensor {DOWN}.weight_scale, which is not in",
    ),
    "index-absent-file": (
        lambda d: change_index(d, lambda m: m.update({"x": "gone.safetensors"})),
        "names the shard gone.safetensors, which is missing",
    ),
    "index-outside": (
        lambda d: change_index(d, lambda m: m.update({"x": "../model.safetensors"})),
        "'../model.safetensors', which is not a file beside it",
    ),
    "index-no-map": (lambda d: (d / INDEX_FILE).write_text("{}"), "has no weight_map"),
    "index-text": (lambda d: (d / INDEX_FILE).write_text("]["), "cannot be read"),
    "index-deep": (lambda d: (d / INDEX_FILE).write_text("[" * 100_000), "nested too deeply"),
    "two-shards": (twice, "in two shards"),
    "no-shard": (lambda d: (d / SHARD).unlink(), "no .safetensors files"),
    "git-lfs": (
        lambda d: (d / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        rf"{SHARD} is a pointer of Git LFS .*`git lfs pull`",
    ),
    "empty-shard": (lambda d: (d / SHARD).write_bytes(b""), f"{SHARD} is damaged"),
    "cut-shard": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-100]),
        f"{SHARD} is damaged",
    ),
    "long-shard": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"more"),
        f"{SHARD} is damaged",
    ),
    "flipped-header-bit": (
        lambda d: flip_bit(d / SHARD, b"down_proj", 1),
        "which is not in model.safetensors",
    ),
    "overlapping": (lambda d: change_header(d / SHARD, overlapping), f"{SHARD} is damaged"),
    "header-of-2-gb": (lambda d: huge_header(d / SHARD), f"{SHARD} is damaged"),
    "header-list": (
        lambda d: (d / SHARD).write_bytes(struct.pack("<Q", 2) + b"[]"),
        f"{SHARD} is damaged",
    ),
    "model-type": (model(model_type="qwen2_vl"), "model_type is 'qwen2_vl', but 'llava'"),
    "architecture": (
        model(architectures=["Qwen2VLForConditionalGeneration"]),
        "architectures is .*Qwen2VL",
    ),
    "hidden-size": (text(hidden_size=512), "but config.json asks for"),
    "intermediate-size": (text(intermediate_size=640), "but config.json asks for"),
    "endless-layers": (text(num_hidden_layers=1 << 60), "num_hidden_layers is 1152921504606846976"),
    "layers": (text(num_hidden_layers=3), "num_hidden_layers is 3, but the blocks stored"),
}


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_an_intact_checkpoint_is_sound(intact: dict[str, Path], scheme: str) -> None:
    require_sound(intact[scheme])
    assert verify(intact[scheme]) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_in_one_sentence(
    checkpoint: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = DAMAGES[damage]
    spoil(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        require_sound(checkpoint)
    assert "\n" not in str(caught.value)
    if damage != "header-of-2-gb":  # a matter of seconds
        assert verify(checkpoint)  # the hashes show it as well, and in which file
    assert main(["inspect", str(checkpoint)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_flipped_bit_of_the_data_is_named_by_verify(checkpoint: Path) -> None:
    """No header shows it, so loading does not see it: that is what the hashes are for."""
    path = checkpoint / SHARD
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert inspect(checkpoint).problems == []
    assert verify(checkpoint) == [f"{SHARD}: changed since the checkpoint was written"]


def test_the_manifest_may_not_name_files_elsewhere(checkpoint: Path) -> None:
    path = checkpoint / "qig_manifest.json"
    listed = json.loads(path.read_text())
    listed["files"] |= {"../config.json": "0" * 64, "/etc/passwd": "0" * 64, "a/../../b": "0" * 64}
    path.write_text(json.dumps(listed))
    wrong = verify(checkpoint)
    assert sum("outside of the directory" in line for line in wrong) == 3


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_by_vllm_before_memory_is_taken(checkpoint: Path, damage: str) -> None:
    """While vLLM makes its configuration: no engine, no worker, no model."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    spoil, _ = DAMAGES[damage]
    spoil(checkpoint)
    with pytest.raises(Exception) as caught:
        EngineArgs(model=str(checkpoint), dtype="bfloat16").create_engine_config()
    print(damage, "|", type(caught.value).__name__, "|", str(caught.value)[:200].replace("\n", " "))
    assert isinstance(caught.value, UserError) or damage in OTHERS


# transformers or vLLM look at these before the plugin is asked, and say it in words of their own;
# qig-serve's commands look first.
OTHERS = ("method-of-another", "model-type", "architecture", "layers", "endless-layers")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_every_family_are_sound(tmp_path: Path) -> None:
    """The checks know what the quantizer writes of each."""

    from helpers.tiny_models import FAMILIES, tiny_model

    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    for family in FAMILIES:
        source = tiny_model(family, tmp_path / family)
        recipe = make_recipe({"method": "rtn", "calib": "demo", "samples": 1})
        quantize(source, tmp_path / f"{family}-out", recipe, quiet=True)
        require_sound(tmp_path / f"{family}-out")
