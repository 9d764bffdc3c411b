"""The checkpoint writer: what a published directory holds, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import CONFIG
from safetensors.torch import load_file, save_file

from qig_serve.errors import UserError
from qig_serve.hashes import HASHES_FILE, file_sha256
from qig_serve.model_directory import INDEX_FILE
from qig_serve.offline import disk
from qig_serve.offline.checkpoint.forms import Form
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.disk import ResumableError
from qig_serve.offline.source.tensors import SourceCheckpoint

FINGERPRINT = {"model": "m", "recipe": {"seed": 0, "samples": 4}, "version": "1"}


@pytest.fixture
def source_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = ["head.weight", "layers.0.up.weight", "layers.0.norm.weight", "layers.1.up.weight"]
    tensors = {n: torch.randn(4, 8, generator=generator) for n in names}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llava"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "templates").mkdir()
    (directory / "templates" / "tool.jinja").write_text("tool")
    (directory / "README.md").write_text("the source's card")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "junk").write_text("junk")
    return directory


def _block(value: int) -> dict[str, torch.Tensor]:
    return {"up.weight_packed": torch.full((4, 3), value, dtype=torch.int32)}


def _write(writer: CheckpointWriter, index: int) -> None:
    tensors = {f"layers.{index}.{k}": v for k, v in _block(index).items()}
    writer.write_block(index, tensors, [f"layers.{index}.up.weight"])


def _killed(source: Path, output: Path, blocks: int) -> Path:
    """The hidden directory of a run that came so far; its lock goes with the writer, unentered."""
    writer = CheckpointWriter(SourceCheckpoint(source), output, FINGERPRINT)
    for index in range(blocks):
        _write(writer, index)
    return writer.directory


def _tree(directory: Path) -> dict[str, str]:
    files = (p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): file_sha256(p) for p in files}


def _quantize(source_dir: Path, output: Path, **options: Any) -> Path:
    source = SourceCheckpoint(source_dir)
    with CheckpointWriter(source, output, FINGERPRINT, **options) as writer:
        for index in range(writer.finished, 2):
            _write(writer, index)
        return writer.publish(Form({"quantization_config": CONFIG}))


def test_published_directory(source_dir: Path, tmp_path: Path) -> None:
    os.umask(umask := os.umask(0o077))
    output = _quantize(source_dir, tmp_path / "out")
    index = json.loads((output / INDEX_FILE).read_text())["weight_map"]
    loaded = {k: v for f in sorted(set(index.values())) for k, v in load_file(output / f).items()}
    assert loaded.keys() == index.keys()
    assert set(loaded) == {
        "head.weight",
        "layers.0.norm.weight",
        "layers.0.up.weight_packed",
        "layers.1.up.weight_packed",
    }
    original = load_file(source_dir / "model.safetensors")
    assert torch.equal(loaded["head.weight"], original["head.weight"])
    config = json.loads((output / "config.json").read_text())
    assert config == {"model_type": "llava", "quantization_config": CONFIG}
    modes = {path.stat().st_mode & 0o777 for path in output.iterdir() if path.is_file()}
    assert modes == {0o666 & ~umask}
    files = _tree(output)
    assert (output / "templates" / "tool.jinja").read_text() == "tool"
    assert not [f for f in files if "junk" in f or "README" in f or "state" in f or "lock" in f]
    manifest = json.loads((output / HASHES_FILE).read_text())["files"]
    assert manifest == {k: v for k, v in files.items() if k != HASHES_FILE}
    assert set(tmp_path.iterdir()) == {source_dir, output}


def test_a_tensor_of_the_source_is_replaced_by_name(source_dir: Path, tmp_path: Path) -> None:
    source = SourceCheckpoint(source_dir)
    with CheckpointWriter(source, tmp_path / "out", FINGERPRINT) as writer:
        writer.write_block(0, {"layers.0.norm.weight": torch.zeros(4, 8)}, [])
        output = writer.publish(Form({"quantization_config": CONFIG}))
    index = json.loads((output / INDEX_FILE).read_text())["weight_map"]
    stored = load_file(output / index["layers.0.norm.weight"])
    assert not stored["layers.0.norm.weight"].any()


def test_existing_output_is_refused(source_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        CheckpointWriter(SourceCheckpoint(source_dir), tmp_path / "out", FINGERPRINT)
    assert list((tmp_path / "out").iterdir()) == []


def test_input_errors_leave_nothing(source_dir: Path, tmp_path: Path) -> None:
    source = SourceCheckpoint(source_dir)
    writer = CheckpointWriter(source, tmp_path / "out", FINGERPRINT)
    with pytest.raises(UserError), writer:
        _write(writer, 0)
        raise UserError("layer 1: NaN")
    assert set(tmp_path.iterdir()) == {source_dir}


def test_resume_after_every_block_gives_the_same_bytes(source_dir: Path, tmp_path: Path) -> None:
    whole = _tree(_quantize(source_dir, tmp_path / "whole"))
    for stop in (0, 1, 2):
        output = tmp_path / f"stopped-{stop}"
        directory = _killed(source_dir, output, blocks=stop)
        (directory / "block-00001.tmp").write_bytes(b"half a block")
        with pytest.raises(UserError, match="--resume"):
            _quantize(source_dir, output)
        assert _tree(_quantize(source_dir, output, resume=True)) == whole


def test_interruption_keeps_the_finished_blocks(source_dir: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(SourceCheckpoint(source_dir), tmp_path / "out", FINGERPRINT)
    with pytest.raises(KeyboardInterrupt), writer:
        _write(writer, 0)
        raise KeyboardInterrupt
    again = CheckpointWriter(
        SourceCheckpoint(source_dir), tmp_path / "out", FINGERPRINT, resume=True
    )
    assert again.finished == 1


def test_a_damaged_block_is_done_again(source_dir: Path, tmp_path: Path) -> None:
    directory = _killed(source_dir, tmp_path / "out", blocks=2)
    (directory / "block-00000.safetensors").write_bytes(b"not what was written")
    again = CheckpointWriter(
        SourceCheckpoint(source_dir), tmp_path / "out", FINGERPRINT, resume=True
    )
    assert again.finished == 0


def test_resume_refuses_other_settings(source_dir: Path, tmp_path: Path) -> None:
    _killed(source_dir, tmp_path / "out", blocks=1)
    other = FINGERPRINT | {"recipe": {"seed": 1, "samples": 4}}
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        CheckpointWriter(SourceCheckpoint(source_dir), tmp_path / "out", other, resume=True)


def test_two_runs_on_one_directory(source_dir: Path, tmp_path: Path) -> None:
    source = SourceCheckpoint(source_dir)
    with (
        pytest.raises(UserError, match="another run"),
        CheckpointWriter(source, tmp_path / "out", FINGERPRINT),
    ):
        CheckpointWriter(source, tmp_path / "out", FINGERPRINT, resume=True)


def test_full_disk_keeps_what_is_done(
    source_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(SourceCheckpoint(source_dir), tmp_path / "out", FINGERPRINT)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResumableError, match="disk is full"), writer:
        _write(writer, 0)
        monkeypatch.setattr("safetensors.torch.save_file", full)
        _write(writer, 1)
    assert writer.directory.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "damaged"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: p.write_bytes((2 << 30).to_bytes(8, "little") + b"{}"), "damaged"),
        (lambda p: p.rename(p.with_name("pytorch_model.bin")), "pickle"),
        (lambda p: p.unlink(), "no safetensors"),
    ],
    ids=["truncated", "empty", "huge-header", "pickle", "absent"],
)
def test_broken_sources_are_named(source_dir: Path, damage: Any, message: str) -> None:
    damage(source_dir / "model.safetensors")
    with pytest.raises(UserError, match=message):
        SourceCheckpoint(source_dir)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"head.weight": "../model.safetensors"}, "not a file beside it"),
        ({"head.weight": "gone.safetensors"}, "gone.safetensors, which is missing"),
        ({"tail.weight": "model.safetensors"}, "tail.weight"),
        ([], "not an index"),
    ],
    ids=["outside", "missing-shard", "missing-tensor", "not-a-map"],
)
def test_broken_index_is_refused(source_dir: Path, weight_map: Any, message: str) -> None:
    (source_dir / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        SourceCheckpoint(source_dir)


def test_fingerprint_sees_the_model(source_dir: Path) -> None:
    before = SourceCheckpoint(source_dir).fingerprint()
    assert before == SourceCheckpoint(source_dir).fingerprint()
    (source_dir / "config.json").write_text('{"model_type": "other"}')
    assert SourceCheckpoint(source_dir).fingerprint() != before


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool],
    ids=str,
)
def test_tensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 7, generator=generator)
    tensors = {
        "a": values.to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "one": values[0, 0, 0].clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = SourceCheckpoint(tmp_path)
    for name, tensor in tensors.items():
        got = source.tensor(name)
        assert got.dtype == tensor.dtype and source.shape(name) == tuple(tensor.shape)
        assert got.shape == tensor.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    # A mapped file would stay resident, and the process grow with the model.
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(50_000)}, path)
    source = SourceCheckpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"w in .*model\.safetensors cannot be read.*shorter"):
        source.tensor("w")


def test_shards_are_cut_and_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About as large as asked for, a larger tensor alone, every tensor in the index once."""
    monkeypatch.setattr(disk, "SHARD_BYTES", 100)
    sizes = {"a": 10, "b": 10, "c": 10, "d": 50, "e": 1}
    tensors = [(name, torch.zeros(n)) for name, n in sizes.items()]
    disk.number_shards(disk.save_shards(iter(tensors), tmp_path, "rest"))
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert index["weight_map"] == dict(
        zip("abcde", [files[i] for i in (0, 0, 1, 2, 3)], strict=True)
    )
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == files


def test_leftovers_of_training_are_not_copied(source_dir: Path, tmp_path: Path) -> None:
    left = ["adapter_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt"]
    left += ["scheduler.pt", "rng_state_0.pth", "hf_quant_config.json", "latest", "zero_to_fp32.py"]
    left += ["trainer_log.jsonl", "training_loss.png", "llamaboard_config.yaml"]
    left += ["model.safetensors.bak", "wandb/run/x.yaml", "checkpoint-500/tokenizer.json"]
    # Other models: an export, one saved meanwhile, what `quantize` wrote there before.
    left += ["onnx/model.onnx_data", "onnx/config.json", "old/model.safetensors", "old/merges.txt"]
    kept = ["chat_template.jinja", "assets/logo.png"]
    for name in (*left, *kept[1:]):
        (source_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (source_dir / name).write_text("{}")
    out = _quantize(source_dir, tmp_path / "out")
    names = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert names >= set(kept) and not names & set(left)


@pytest.mark.parametrize("place", ["file/out", "n" * 300, "n" * 250, "/proc/out", "loop/out"])
def test_where_nothing_can_be(source_dir: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="out|nnn.* cannot be written: "):
        _quantize(source_dir, tmp_path / place)
