"""`qig-serve inspect` and `qig-serve families`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_llava
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.formats import SCHEMES
from qig_serve.offline.disk import write_hashes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.build(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    directory = tiny_llava.quantize(source, tmp_path / "w3a16", "w3a16")
    write_hashes(directory)
    return directory


def test_facts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "w3a16: 3-bit weights, groups of 128, 16-bit activations" in out
    # 3 bits, and in every group of 128 a 16-bit scale and an 8-bit zero point.
    assert "14 linears, 3.188 bits per weight" in out
    assert "verified: every file is as it was written" in out
    assert re.search(r"self_attn\.q_proj +2 +256 x 256 +3\.188", out)
    assert re.search(r"vision_tower +\d+\.\d KiB", out)


def test_facts_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--verify", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["scheme"], record["problems"]) == ("w3a16", []) and record["hashes_compared"]
    assert len(record["linears"]) == 14 and record["bits_per_weight"] == pytest.approx(3.1875)
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert main(["inspect", str(checkpoint), "--verify", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert "model.safetensors: changed" in record["problems"][0] and "linears" not in record


def test_a_changed_byte_names_the_file(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(checkpoint)]) == 0  # nobody asked for the hashes
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "WRONG  model.safetensors: changed since the checkpoint was written" in out
    assert "verified" not in out


def test_missing_and_added_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "modeling_evil.py").write_text("print()")
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "WRONG  generation_config.json: missing" in out
    assert "WRONG  modeling_evil.py: not in the manifest" in out


def test_a_cut_shard_is_named_even_without_verify(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["inspect", str(checkpoint)]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    assert "WRONG  model.safetensors: changed" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["missing", "dtype", "shape"])
def test_tensors_are_checked_against_the_scheme(
    checkpoint: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.1.mlp.up_proj.weight_scale"
    if wrong == "missing":
        del tensors[name]
    elif wrong == "dtype":
        tensors[name] = tensors[name].to(torch.float64)
    else:
        tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    assert main(["inspect", str(checkpoint)]) == 1
    assert f"WRONG  {name}:" in capsys.readouterr().out


def test_manifest_may_not_name_files_elsewhere(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "qig_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    assert "WRONG  ../secret: the manifest names a file outside" in capsys.readouterr().out


def test_not_a_checkpoint(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, message in ((source, "not a qig checkpoint"), (source / "no", "does not exist")):
        assert main(["inspect", str(directory)]) == 2
        assert message in capsys.readouterr().err


def test_families_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    from qig_serve.architectures import ARCHITECTURES

    assert main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in rows] == list(ARCHITECTURES)
    sizes = {"glm4v": 6, "qwen3_5": 10, "qwen3_5_moe": 13, "minicpmv4_6": 10, "lfm2_vl": 9}
    sizes |= {"gemma4": 10, "glm4v_moe": 13, "minicpmv4_7": 10, "glm_ocr": 6, "muse_glimmer": 8}
    assert all(len(row["quantized"]) == sizes.get(row["model_type"], 7) for row in rows)
    servable = [scheme.name for scheme in SCHEMES.values() if scheme.servable]
    assert all(row["tested"] == servable for row in rows)  # what the tests of vLLM go through
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ARCHITECTURES)


def test_families_is_readable_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row per family: no column so narrow that its words stand below each other."""
    from qig_serve.architectures import ARCHITECTURES

    monkeypatch.setenv("COLUMNS", "80")
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split()[0] == "model_type"
    rows = lines[1 : len(ARCHITECTURES) + 1]
    assert [row.split()[0] for row in rows] == list(ARCHITECTURES)
    for row, family in zip(rows, ARCHITECTURES.values(), strict=True):
        assert row.rstrip().endswith(family.note)
