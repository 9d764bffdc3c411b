"""What /v1/quantization and `doctor` say of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from helpers import tiny_llava
from helpers.family_answers import quantize_tiny
from helpers.tiny_models import tiny_model

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.model_directory import read_manifest
from qig_serve.serving.describe import describe, serving_dtype


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("describe")
    source = tiny_llava.build(folder / "source")
    schemes = {s: tiny_llava.quantize(source, folder / s, s) for s in ("w3a16", "w4a8")}
    return {"source": source} | schemes


@pytest.mark.parametrize(("scheme", "bits"), [("w3a16", 3 + 24 / 128), ("w4a8", 4)])
def test_report(checkpoints: dict[str, Path], scheme: str, bits: float) -> None:
    report = describe(checkpoints[scheme], torch.bfloat16)
    assert len(report.layers) == 14 and not report.problems
    assert sum(report.kernels.values()) == 14
    weights = sum(layer.n * layer.k for layer in report.layers)
    assert weights == 2 * (256 * (256 + 256 + 128 + 128) + 3 * 256 * 512)
    scales = 4 * sum(layer.n for layer in report.layers) if scheme == "w4a8" else 0
    assert report.quantized_bytes == weights * bits / 8 + scales
    assert report.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2  # k and v, layers, heads, size, bytes
    assert report.tensor_parallel_sizes == [1, 2]
    bits_in_memory = {"w3a16": 4.25, "w4a8": report.quantized_bytes * 8 / weights}[scheme]
    in_memory = (report.memory_bytes - report.other_bytes) * 8 / weights
    assert bits_in_memory <= in_memory < 9
    assert report.device_bytes > 1 << 30
    json.dumps(report.as_json())


def test_fp32_takes_the_reference(checkpoints: dict[str, Path]) -> None:
    assert describe(checkpoints["w3a16"], torch.float32).kernels == {"fp32 reference": 14}
    (w4a8,) = describe(checkpoints["w4a8"], torch.float32).kernels
    assert w4a8 in ("torch int8 GEMM", "torch GEMM on widened codes")


def test_uneven_split_is_a_problem(checkpoints: dict[str, Path]) -> None:
    report = describe(checkpoints["w3a16"], torch.bfloat16, tensor_parallel_size=4)
    (problem,) = report.problems  # and not that of every layer too
    assert "256 inputs of o in multiples of 128" in problem


def test_more_stages_than_blocks_are_a_problem(checkpoints: dict[str, Path]) -> None:
    assert not describe(checkpoints["w3a16"], torch.bfloat16, pipeline_parallel_size=2).problems
    report = describe(checkpoints["w3a16"], torch.bfloat16, pipeline_parallel_size=3)
    assert report.problems == [
        "pipeline parallel size 3 does not fit: the decoder has 2 blocks, and each device needs "
        "one at least"
    ]
    assert report.as_json()["pipeline_parallel_size"] == 3


def test_whole_experts_are_shared_out(tmp_path: Path) -> None:
    """384 inputs of an expert are three groups: not cut for two, and half of the experts each."""
    source = tiny_model("qwen3_vl_moe", tmp_path / "source")
    checkpoint = quantize_tiny(source, tmp_path / "out", "w3a16", method="rtn")
    cut = describe(checkpoint, torch.bfloat16, 2)
    assert any("384 inputs of an expert's down" in problem for problem in cut.problems)
    shared = describe(checkpoint, torch.bfloat16, 2, expert_parallel=True)
    assert not shared.problems
    assert shared.memory_bytes < describe(checkpoint, torch.bfloat16).memory_bytes


def test_heads_of_the_vision_tower_must_divide(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((checkpoints["w4a8"] / "config.json").read_text())
    config["vision_config"] |= {"num_attention_heads": 3, "hidden_size": 129}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoints["w4a8"] / "model.safetensors")
    report = describe(tmp_path, torch.bfloat16, 2)
    assert report.tensor_parallel_sizes == [1]
    assert report.problems == [
        "tensor parallel size 2 does not fit: 3 heads of the vision tower cannot be split 2 ways "
        "(these sizes fit: 1); "
        "--pipeline-parallel-size splits by layers instead"
    ]
    whole = describe(tmp_path, torch.bfloat16, 2, split_vision_tower=False)
    assert whole.tensor_parallel_sizes == [1, 2, 4] and not whole.problems


def test_recovery_is_the_reports(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoints["w4a8"] / name)
    assert describe(tmp_path, torch.bfloat16).recovery is None
    full = {"n": 200, "exact_match": 0.9}
    own = full | {"exact_match": 0.88, "kl": {"kl_mean": 0.0057, "top1": 0.995}}
    evaluation = {"data": "demo", "results": {"fp": full, "quantized": own}}
    (tmp_path / "report.json").write_text(json.dumps({"evaluation": evaluation}))
    report = describe(tmp_path, torch.bfloat16)
    assert report.as_json()["recovery"] == {
        "data": "demo",
        "questions": 200,
        "exact_match": 0.88,
        "exact_match_full_precision": 0.9,
        "kl_mean": 0.0057,
        "top1": 0.995,
    }
    words = "88.0% exact match, full precision 90.0%, on 200 questions; KL 0.0057 nats per token"
    assert any(words in line for line in report.lines())
    (tmp_path / "report.json").write_text('{"evaluation": {}}')
    with pytest.raises(UserError, match=r"report\.json: not a report of this version"):
        describe(tmp_path, torch.bfloat16)


def test_too_little_memory_is_a_problem(checkpoints: dict[str, Path]) -> None:
    report = describe(checkpoints["w4a8"], torch.bfloat16)
    assert not report.problems
    two = describe(checkpoints["w4a8"], torch.bfloat16, pipeline_parallel_size=2)
    assert 0 <= 2 * two.memory_bytes - two.other_bytes - report.memory_bytes + 1 <= 1
    small = dataclasses.replace(report, device_bytes=report.memory_bytes - 1)
    assert "use more devices (--tensor-parallel-size, --pipe" in small.problems[0]
    assert "cannot be served" in small.lines()[-1]


def test_unsupported_vllm_is_one_sentence(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import vllm

    # Those of this process are pytest's.
    monkeypatch.setattr("qig_serve.serving.stop_signals.take_stop_signals", lambda: None)
    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    for command in ("doctor", "serve"):
        assert main([command, str(checkpoints["w4a8"])]) == 2
        sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence == (
            f"qig-serve {command}: qig-serve supports vllm>=0.26,<0.34, but vLLM 0.25.1 is "
            "installed: install a supported version, or remove qig-serve from this environment"
        )


def test_without_vllm_serve_is_one_sentence(checkpoints: dict[str, Path]) -> None:
    """Nor what vLLM brings, which the handling of Ctrl-C needs."""
    absent = "import sys\nsys.modules.update(dict.fromkeys(['vllm', 'psutil', 'starlette']))\n"
    words = ["serve", str(checkpoints["w4a8"])]
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{absent}from qig_serve.cli import main\nmain({words})"],
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("qig-serve serve: serving needs vLLM (vllm>=")
    assert done.stderr.count("\n") == 1


def test_dtype_is_the_checkpoints_unless_asked(checkpoints: dict[str, Path]) -> None:
    assert serving_dtype(checkpoints["w3a16"]) == torch.bfloat16
    assert serving_dtype(checkpoints["w3a16"], "half") == torch.float16
    assert serving_dtype(checkpoints["w3a16"], "float32") == torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "is not a qig checkpoint"),
        ('{"quantization_config": {"quant_method": "awq"}}', "is not a qig checkpoint"),
        ('{"quantization_config": {"quant_method": "qig"}}', "quantization_config.format_version"),
    ],
    ids=["no-config", "cut-short", "list", "full-precision", "another-method", "no-version"],
)
def test_what_is_no_checkpoint(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_damaged_shard_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["w4a8"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        describe(tmp_path, torch.bfloat16)
    for content in (b"", b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"x" * 16):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            describe(tmp_path, torch.bfloat16)


def run_doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    return main(["doctor", *words]), capsys.readouterr().out


def test_doctor(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(checkpoints["w3a16"])
    status, text = run_doctor(capsys, directory)
    assert status == 0, text
    for words in ("w3a16, quantized with rtn", "14 layers", "1, 2"):
        assert words in text
    status, text = run_doctor(capsys, directory, "--tensor-parallel-size", "4")
    assert status == 1, text
    for words in ("cannot be served", "does not fit: 256 inputs of o", "(these sizes fit: 1, 2)"):
        assert words in text
    status, text = run_doctor(capsys, directory, "--json")
    assert status == 0, text
    record = json.loads(text)
    assert record.pop("loaded")["sound"]
    assert record == describe(checkpoints["w3a16"], torch.bfloat16).as_json()
    assert json.loads(text)["vllm"] and not json.loads(text)["problems"]
