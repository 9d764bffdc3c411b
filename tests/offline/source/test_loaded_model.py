"""Model directories that are not as they should be: one sentence, naming what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qig_serve.errors import UserError
from qig_serve.offline.source import loaded_model
from qig_serve.offline.source.decoder_config import check_block_count

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = "language_model.model.layers.1."
PROJECTOR = "multi_modal_projector.linear_1.weight"
Tensors = dict[str, torch.Tensor]


def _edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def _index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Splits the weights into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, first in enumerate((True, False), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {k: v for k, v in tensors.items() if k.startswith("language_model") is first}
        save_file(part, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    change(weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)


def _no_config(d: Path) -> None:
    (d / "config.json").unlink()


def _config_is_no_json(d: Path) -> None:
    _config(d, "{")


def _unknown_family(d: Path) -> None:
    _config(d, json.dumps({"model_type": "bert"}))


def _no_family(d: Path) -> None:
    _config(d, json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))


def _another_decoder(d: Path) -> None:
    """Gemma's norms multiply by (1 + w): folding them as Llama's would break the model."""
    config = json.loads((d / "config.json").read_text())
    _config(d, json.dumps(config | {"text_config": {"model_type": "gemma"}}))


def _quantized_already(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    _config(d, json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def _no_processor(d: Path) -> None:
    for path in (*d.glob("*processor_config.json"), *d.glob("tokenizer*")):
        path.unlink()


def _no_chat_template(d: Path) -> None:
    (d / "chat_template.jinja").unlink()
    config = json.loads((d / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (d / "tokenizer_config.json").write_text(json.dumps(config))


def _pickle(d: Path) -> None:
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def _no_weights(d: Path) -> None:
    (d / "model.safetensors").unlink()


def _cut_short(d: Path) -> None:
    path = d / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _missing_shard(d: Path) -> None:
    _index(d, lambda m: None)
    (d / "model-00001-of-00002.safetensors").unlink()


def _index_names_an_absent_tensor(d: Path) -> None:
    _index(d, lambda m: m.update({"ghost.weight": "model-00002-of-00002.safetensors"}))


def _block_lacks_a_tensor(d: Path) -> None:
    _edit(d, lambda t: t.pop(BLOCK + "mlp.up_proj.weight"))


def _block_of_another_size(d: Path) -> None:
    name = BLOCK + "mlp.up_proj.weight"
    _edit(d, lambda t: t.update({name: t[name][:128]}))


def _no_blocks(d: Path) -> None:
    names = [n for n in load_file(d / "model.safetensors") if ".layers." in n and "tower" not in n]
    _edit(d, lambda t: [t.pop(n) for n in names])


def _projector_lacks_a_tensor(d: Path) -> None:
    _edit(d, lambda t: t.pop(PROJECTOR))


def _projector_of_another_size(d: Path) -> None:
    _edit(d, lambda t: t.update({PROJECTOR: t[PROJECTOR][:5]}))


def _projector_not_finite(d: Path) -> None:
    _edit(d, lambda t: t[PROJECTOR].view(-1)[7].fill_(float("nan")))


def _unknown(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        _edit(d, lambda t: t.update({name: tensor}))

    return spoil


def _int8_decoder(d: Path) -> None:
    name = BLOCK + "mlp.up_proj.weight"
    _edit(d, lambda t: t.update({name: t[name].to(torch.int8)}))


def _float8_tower(d: Path) -> None:
    _edit(d, lambda t: t.update({PROJECTOR: t[PROJECTOR].to(torch.float8_e4m3fn)}))


def _fewer_blocks_in_config(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    _config(d, json.dumps(config))


def _more_blocks_in_config(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    _config(d, json.dumps(config))


def _fewer_tower_layers_in_config(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] -= 1
    _config(d, json.dumps(config))


def _nested_claim(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "awq"}
    _config(d, json.dumps(config))


def _two_sets(d: Path) -> None:
    _index(d, lambda m: None)
    save_file({"x": torch.zeros(1)}, d / "model.safetensors")


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_int8_decoder, rf"{BLOCK}mlp\.up_proj\.weight in .* is I8, and weights must be"),
        (_float8_tower, rf"quantized already: {PROJECTOR} in .* stored in F8_E4M3"),
        (_fewer_blocks_in_config, r"2 decoder blocks in its files .* config\.json is 1"),
        (_more_blocks_in_config, r"2 decoder blocks in its files.* config\.json is 5"),
        (_fewer_tower_layers_in_config, r"vision_tower.* is a .* that config\.json does not know"),
        (_nested_claim, r"quantized already with awq \(config\.json: text_config\.quant"),
        (_two_sets, "two sets of weights"),
        (_unknown(BLOCK + "mlp.up_proj.bias", ONE), r"layers\.1\.mlp\.up_proj\.bias .* is a bias"),
        (_unknown(BLOCK + "mlp.up_proj.weight_scale", ONE), "up_proj.weight_scale .* part of a"),
        (_unknown(BLOCK + "mlp.up_proj.levels", ONE), "up_proj.levels .* config.json does not"),
        (_unknown(BLOCK + "extra.weight", ONE), "extra.weight .* config.json does not know"),
        (_unknown("language_model.model.extra", ONE), "language_model.*extra .* does not know"),
        (_unknown("model.language_model.layers.0.x", ONE), "layers.0.x .* does not know"),
        (_unknown("language_model.model.layers.x", ONE), "layers.x .* does not know"),
        (_unknown("vision_tower.vision_model.extra.bias", ONE), "extra.bias .* does not know"),
        (_unknown("another.weight", ONE), "another.weight .* config.json does not know"),
    ],
)
def test_what_is_not_understood(
    model: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qig_serve.cli import main

    spoil(model)
    assert main(["quantize", str(model), "--calib", "demo", "--output", str(model / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and not (model / "out").exists()


def test_tables_of_older_files_are_copied(model: Path) -> None:
    kept = {
        BLOCK + "self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 9, dtype=torch.int64),
    }
    _edit(model, lambda t: t.update(kept))
    loaded_model.load(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_config, "has no config.json"),
        (_config_is_no_json, "config.json cannot be read"),
        (_unknown_family, r"'bert' are not supported; known types: exaone4_5, .*smolvlm"),
        (_no_family, r"/config\.json names no model_type: give the config\.json that was publ"),
        (_another_decoder, r"llava model with a 'gemma' decoder.*known decoders: llama"),
        (_quantized_already, "quantized already"),
        (_no_processor, "has no usable processor|no image processor"),
        (_no_chat_template, "has no chat template"),
        (_pickle, r"pickle form \(pytorch_model.bin\)"),
        (_no_weights, "no safetensors weights"),
        (_cut_short, r"the shard .*model\.safetensors is damaged"),
        (_missing_shard, "shard model-00001-of-00002.safetensors, which is missing"),
        (_index_names_an_absent_tensor, "ghost.weight"),
        (_block_lacks_a_tensor, rf"has no tensor {BLOCK}mlp\.up_proj\.weight"),
        (_block_of_another_size, r"layers\.1\.mlp\.up_proj\.weight is \[128, 256\]"),
        (_no_blocks, "no decoder block among the tensors"),
        (_projector_lacks_a_tensor, r"multi_modal_projector\.linear_1\.weight: the checkpoint is"),
        (_projector_of_another_size, r"multi_modal_projector\.linear_1\.weight is \[5, 128\]"),
        (_projector_not_finite, r"multi_modal_projector\.linear_1\.weight .* NaN"),
    ],
    ids=lambda f: f.__name__.lstrip("_") if callable(f) else "",
)
def test_refused(model: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(model)
    with pytest.raises(UserError, match=message) as caught:
        loaded_model.load(model)
    assert "\n" not in str(caught.value)


def test_absent_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        loaded_model.load(tmp_path / "nowhere")


def test_shards_are_as_good_as_one_file(intact: Path, model: Path) -> None:
    _index(model, lambda m: None)
    one, two = loaded_model.load(intact).block(1), loaded_model.load(model).block(1)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_asked_block_is_in_memory(intact: Path) -> None:
    """The loaded model keeps no decoder weight; a block comes in the dtype asked for."""
    loaded = loaded_model.load(intact)
    inside = loaded.arch.decoder + ".layers."
    assert not [n for n, _ in loaded.model.named_parameters() if n.startswith(inside)]
    block = loaded.block(1, torch.bfloat16)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert not block.training


@pytest.mark.parametrize(("part", "key"), [("text_config", "num_hidden_layers"), ("v", "depth")])
def test_blocks_without_end(part: str, key: str) -> None:
    """transformers would make them for hours, of the decoder as of the tower."""
    with pytest.raises(UserError, match=rf"config.json: {part}.{key} is 1000000000, .* damaged"):
        check_block_count({part: {key: 10**9}}, Path("config.json"))
    check_block_count({part: {key: 100}, key: 12, "other": None}, Path("config.json"))
