"""Source models that are damaged or hostile: refused by the name of the file or the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantizer_runs as runs
import torch
from helpers.damage import change_header, change_index, flip_bit, huge_header
from safetensors.torch import load_file, save_file

from qig_serve.errors import UserError
from qig_serve.model_directory import INDEX_FILE
from qig_serve.offline.source import loaded_model
from qig_serve.offline.source.tensors import SourceCheckpoint

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a.weight": torch.ones(4, 8), "b.weight": torch.ones(8)}, directory / SHARD)
    save_file({"c.weight": torch.ones(4, 8)}, directory / OTHER)
    index = {"a.weight": SHARD, "b.weight": SHARD, "c.weight": OTHER}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text('{"model_type": "llava"}')
    return directory


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage: another header before the same data."""
    return lambda d: change_header(d / SHARD, change)


def index(**names: Any) -> Callable[[Path], None]:
    """A damage: further names in the index."""
    return lambda d: change_index(d, lambda m: m.update(names))


def pickled(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a.weight": torch.ones(2)}, directory / "pytorch_model.bin")


def text_index(text: str) -> Callable[[Path], None]:
    return lambda d: (d / INDEX_FILE).write_text(text) and None


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), SHARD),
    "zero-byte": (lambda d: (d / SHARD).write_bytes(b""), SHARD),
    "longer": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"x"), SHARD),
    "missing": (lambda d: (d / SHARD).unlink(), f"{SHARD}, which is missing"),
    "header-of-2-gb": (lambda d: huge_header(d / SHARD), SHARD),
    "header-bit-flipped": (
        lambda d: flip_bit(d / SHARD, b"a.weight", 4),
        f"a.weight, which is not in {SHARD}",
    ),
    "overlapping": (
        header(lambda h: h["b.weight"].update(data_offsets=h["a.weight"]["data_offsets"])),
        SHARD,
    ),
    "beyond-the-end": (header(lambda h: h["a.weight"].update(data_offsets=[0, 1 << 60])), SHARD),
    "backwards": (header(lambda h: h["a.weight"].update(data_offsets=[128, 0])), SHARD),
    "shape-of-another-size": (header(lambda h: h["a.weight"].update(shape=[4, 9])), SHARD),
    "endless-shape": (header(lambda h: h["a.weight"].update(shape=[1 << 62, 1 << 62])), SHARD),
    "unknown-dtype": (header(lambda h: h["a.weight"].update(dtype="F7")), SHARD),
    "index-absent-file": (index(z="gone.safetensors"), "gone.safetensors, which is missing"),
    "index-outside": (index(z="../model.safetensors"), "not a file beside it"),
    "index-absolute": (index(z="/etc/passwd"), "not a file beside it"),
    "index-pickle": (index(z="pytorch_model.bin"), "not a file beside it"),
    "index-long-name": (index(z="x" * 300 + ".safetensors"), "which is missing"),
    "index-nul": (index(z="x\0.safetensors"), "which is missing"),
    "index-number": (index(z=5), "not a file beside it"),
    "index-absent-tensor": (index(z=SHARD), f"z, which is not in {SHARD}"),
    "index-nested": (text_index("[" * 100_000), "not an index"),
    "index-endless-number": (text_index('{"weight_map": ' + "9" * 5000), "not an index"),
    "index-text": (text_index("no JSON"), "not an index"),
    "tensor-twice": (lambda d: shutil.copy(d / SHARD, d / OTHER), "in two shards"),
    "pickle": (pickled, "pickle form"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_by_name(sharded: Path, damage: str) -> None:
    SourceCheckpoint(sharded).close()
    spoil, message = DAMAGES[damage]
    spoil(sharded)
    with pytest.raises(UserError, match=message) as caught:
        SourceCheckpoint(sharded)
    assert "\n" not in str(caught.value)


def test_pickles_beside_safetensors_are_not_opened_and_not_copied(
    sharded: Path, tmp_path: Path
) -> None:
    from qig_serve.offline.checkpoint.forms import Form
    from qig_serve.offline.checkpoint.writer import CheckpointWriter

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save(Evil(), sharded / "pytorch_model.bin")
    with CheckpointWriter(SourceCheckpoint(sharded), tmp_path / "out", {}) as writer:
        output = writer.publish(Form())
    assert not list(output.glob("*.bin")) and not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_source(tmp_path_factory.mktemp("source")) / "model"


LAYER = "language_model.model.layers.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (f"{LAYER}.mlp.up_proj.weight", f"layer 1: {LAYER}.mlp.up_proj.weight"),
        (f"{LAYER}.input_layernorm.weight", f"layer 1: {LAYER}.input_layernorm.weight"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight"),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    ],
    ids=["linear", "norm", "embedding", "projector"],
)
def test_a_weight_that_is_no_number_is_named(
    model: Path, tmp_path: Path, tensor: str, message: str, value: float
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{message} .*NaN or infinity"):
        loaded_model.load(broken).block(1)


@pytest.mark.parametrize(
    "tensor", [f"{LAYER}.mlp.up_proj.weight", "multi_modal_projector.linear_1.weight"]
)
def test_a_weight_beyond_the_dtype_of_the_configuration_is_named(
    model: Path, tmp_path: Path, tensor: str
) -> None:
    """float16, it says, of weights of a wider range: they would be infinite when it is served."""
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors[tensor].view(-1)[3] = 1e5
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(UserError, match="weight .*holds 9.98e.04, more than torch.float16"):
        loaded_model.load(broken).block(1)


def test_endless_decoders_are_not_built(model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1 << 60
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers is 1152921504606846976"):
        loaded_model.load(broken)
