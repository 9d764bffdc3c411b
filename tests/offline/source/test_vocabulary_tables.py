"""Output head and embedding in 8 bits: what is written, checked, read back, counted and refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tensors_of
from helpers.tiny_models import one_sample, tiny_model
from safetensors.torch import load_file, save_file

from qig_serve import packing
from qig_serve.cli import main
from qig_serve.formats import VOCABULARY_SCHEME
from qig_serve.model_directory import read_manifest
from qig_serve.offline.checkpoint import writer as writer_module
from qig_serve.offline.pipeline import LOG_FILE
from qig_serve.offline.source import loaded_model
from qig_serve.offline.source.vocabulary import in_eight_bits, rounded_inputs
from qig_serve.transformers_plugin import load_dequantized

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD, EMBEDDING = "language_model.lm_head", "language_model.model.embed_tokens"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA has two tables, Gemma 3 one, Gemma 4 E2B one more for its blocks."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(name, folder / name) for name in ("llava", "gemma3", "gemma4_e2b")}


def quantize(model: Path, output: Path, *flags: str) -> int:
    data = one_sample(model.parent)
    words = ["--calib", data, "--method", "rtn", "--quiet", "--output", str(output), *flags]
    return main(["quantize", str(model), *words])


@pytest.fixture(scope="module")
def both(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's checkpoint with both tables in 8 bits."""
    output = tmp_path_factory.mktemp("both") / "out"
    assert quantize(models["llava"], output, "--head", "8", "--embeddings", "8") == 0
    return output


def weight_of(tensors: Tensors, name: str) -> torch.Tensor:
    parts = {key: tensors[f"{name}.{key}"] for key in ("weight_packed", "weight_scale")}
    return packing.unpack_rows(parts, VOCABULARY_SCHEME, torch.float32)


@pytest.mark.parametrize("head", [8, 16])
@pytest.mark.parametrize("embeddings", [8, 16])
def test_each_of_the_two(
    models: dict[str, Path], tmp_path: Path, head: int, embeddings: int
) -> None:
    output, source = tmp_path / "out", load_file(models["llava"] / "model.safetensors")
    flags = ["--head", str(head), "--embeddings", str(embeddings)]
    assert quantize(models["llava"], output, *flags) == 0
    tensors, manifest = tensors_of(output), read_manifest(output)
    model: Any = load_dequantized(output, torch.float32)
    modules = {
        HEAD: (head, model.get_output_embeddings()),
        EMBEDDING: (embeddings, model.get_input_embeddings()),
    }
    for name, (bits, module) in modules.items():
        assert (name in manifest.eight_bit) == (bits == 8) != manifest.is_ignored(name)
        weight = source[f"{name}.weight"].float()
        if bits == 16:
            assert torch.equal(tensors[f"{name}.weight"], source[f"{name}.weight"])
            assert torch.equal(module.weight, weight)
            continue
        assert f"{name}.weight" not in tensors
        found, scale = weight_of(tensors, name), tensors[f"{name}.weight_scale"]
        assert bool(((found - weight).abs() <= scale / 2 * 1.001).all())
        assert torch.equal(module.weight, found)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert ("eight_bit" in config) == (8 in (head, embeddings)), "older readers know no such field"
    card = (output / "README.md").read_text()
    assert ("output head and embedding in 8 bits" in card) == (head == embeddings == 8)


def test_a_tied_model_stores_one_table(models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert quantize(models["gemma3"], output, "--head", "8", "--embeddings", "8") == 0
    manifest = read_manifest(output)
    assert len(manifest.eight_bit) == 1 and manifest.eight_bit_is_tied
    model: Any = load_dequantized(output, torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert torch.equal(embedding.weight, weight_of(tensors_of(output), manifest.eight_bit[0]))
    assert float(embedding.embed_scale) == pytest.approx(16)  # the model's own, not the file's


def test_a_tied_model_stays_in_16_bits_unless_both_may(models: dict[str, Path]) -> None:
    loaded = loaded_model.load(models["gemma3"])
    names, note = in_eight_bits(loaded, 8, 16)
    assert not names and "one tensor" in note
    assert in_eight_bits(loaded, 16, 16) == ([], "")


def test_an_embedding_for_every_block(models: dict[str, Path], tmp_path: Path) -> None:
    """In 8 bits with the other, or alone where a tied one has to stay; the canary agrees."""
    per_block = "model.language_model.embed_tokens_per_layer"
    for head, count in (("8", 2), ("16", 1)):
        output = tmp_path / head
        flags = ("--head", head, "--embeddings", "8")
        assert quantize(models["gemma4_e2b"], output, *flags) == 0
        manifest, tensors = read_manifest(output), tensors_of(output)
        assert manifest.eight_bit_per_block == per_block and len(manifest.eight_bit) == count
        assert f"{per_block}.weight" not in tensors
        model: Any = load_dequantized(output, torch.float32)
        weight = model.get_submodule(per_block).weight
        assert torch.equal(weight, weight_of(tensors, per_block))
        card = (output / "README.md").read_text()
        assert per_block in card and main(["inspect", str(output), "--verify"]) == 0
    assert quantize(models["gemma4_e2b"], tmp_path / "disk", *flags, "--offload", "disk") == 0
    on_disk = tensors_of(tmp_path / "disk")
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in tensors.items())
    log = (tmp_path / "disk" / LOG_FILE).read_text()
    assert "left out, as no block reads them" in log and "self_attn.k_proj.weight to" in log


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_the_quantized_stream_begins_with_rounded_rows(
    models: dict[str, Path], both: Path, family: str, tmp_path: Path
) -> None:
    """What block 0 is given is what the checkpoint's own embedding gives, bit by bit."""
    output = both if family == "llava" else tmp_path / "out"
    if family != "llava":
        assert quantize(models[family], output, "--head", "8", "--embeddings", "8") == 0
    loaded = loaded_model.load(models[family])
    inputs = {"input_ids": torch.tensor([[1, 5, 5, 9]])}
    before = loaded.block_inputs(inputs)
    assert rounded_inputs(loaded, inputs, before).hidden is before.hidden
    loaded.eight_bit, _ = in_eight_bits(loaded, 8, 8)
    rounded = rounded_inputs(loaded, inputs, before).hidden
    assert not torch.equal(rounded, before.hidden)
    embedding = load_dequantized(output, torch.float32).get_input_embeddings()  # type: ignore
    assert torch.equal(rounded, embedding(inputs["input_ids"]))


def wrong_scale(t: Tensors) -> None:
    t[f"{HEAD}.weight_scale"] *= 1.5


def wrong_rows(t: Tensors) -> None:
    t[f"{HEAD}.weight_packed"] = t[f"{HEAD}.weight_packed"].flip(0).contiguous()


def lost_scale(t: Tensors) -> None:
    del t[f"{HEAD}.weight_scale"]


def both_ways(t: Tensors) -> None:
    t[f"{HEAD}.weight"] = weight_of(t, HEAD).bfloat16()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_scale, "lm_head in the written checkpoint is further than half a step"),
        (wrong_rows, "lm_head in the written checkpoint is further than half a step"),
        (lost_scale, "has no tensor .*lm_head.weight_scale"),
        (both_ways, "lm_head.weight"),
    ],
)
def test_the_canary_looks_at_the_head(
    models: dict[str, Path],
    spoil: Callable[[Tensors], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = writer_module.save_shards

    def spoiled(tensors: Any, *rest: Any) -> Any:
        ready = dict(tensors)
        spoil(ready)
        return save(ready.items(), *rest)

    monkeypatch.setattr(writer_module, "save_shards", spoiled)
    assert quantize(models["llava"], tmp_path / "out", "--head", "8") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not published" in line and re.search(message, line)


def test_inspect_counts_them(
    models: dict[str, Path], both: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(both), "--verify", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["problems"] == [] and set(record["vocabulary"]) == {HEAD, EMBEDDING}
    assert record["vocabulary"][HEAD]["bits_per_weight"] == pytest.approx(8 + 32 / 256)
    source = load_file(models["llava"] / "model.safetensors")
    weights = sum(tensor.numel() for tensor in source.values())
    assert record["bits_per_weight_of_model"] == pytest.approx(8 * record["bytes"] / weights)
    assert record["bytes_in_16_bits"] == 2 * weights
    assert HEAD not in record["left_in_16_bits"]
    assert main(["inspect", str(both)]) == 0
    assert re.search(r"lm_head +1 +\d+ x 256 +8\.125", capsys.readouterr().out)


def lose_a_table(tensors: Tensors, config: dict[str, Any]) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        del tensors[f"{HEAD}.{suffix}"]


def other_size(tensors: Tensors, config: dict[str, Any]) -> None:
    config["text_config"]["vocab_size"] += 64


def unlisted(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["eight_bit"].remove(HEAD)


def listed_twice(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append(HEAD)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_table, r"lm_head: listed as stored in 8 bits, but there is no"),
        (other_size, r"lm_head: \d+ x 256, but config\.json asks for"),
        (unlisted, r"lm_head\.weight_packed"),
        (listed_twice, r"eight_bit names '\S*lm_head', which is .* left in 16 bits"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    both: Path,
    spoil: Callable[[Tensors, dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(both, tmp_path / "out"))
    tensors, config = tensors_of(output), json.loads((output / "config.json").read_text())
    spoil(tensors, config)
    for path in [*output.glob("*.safetensors"), *output.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(output)]) in (1, 2)
    streams = capsys.readouterr()
    assert re.search(message, streams.out + streams.err)


def test_compressed_tensors_keeps_16_bits_and_says_so(
    models: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = ["--format", "compressed-tensors", "--head", "8", "--embeddings", "8"]
    assert quantize(models["llava"], output, *flags) == 0
    assert f"{HEAD}.weight" in tensors_of(output)
    log = (output / "quantize.log").read_text()
    assert "compressed-tensors: output head and embedding stay in 16 bits" in log


def test_other_numbers_of_bits_are_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(models["llava"], tmp_path / "out", "--head", "4") == 2
    assert "head" in capsys.readouterr().err
