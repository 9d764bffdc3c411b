"""`make gpu-vllm` on vLLM's CPU engine, with tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_vllm
import gpu_vllm_models as models
import gpu_vllm_run as run
import pytest


def _run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", gpu_vllm.__file__, "--device", "cpu", "--tiny"]
    command += ["--seconds", "3000"]  # the machine may be busy
    return subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words],
        capture_output=True, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", models.MODELS)
def test_together_on_the_cpu_engine(model: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    all_of_it = model == "qwen2-vl-7b"
    ran = ["w4a8", "bf16"] if all_of_it else ["w4a8"]
    words = ["together", "--model", model, "--start-limit", "2900", "--demos"]
    rivals = ["humming-w3a16"] if all_of_it else []
    done = _run(tmp_path, *words, "--variants", *rivals, *ran)
    assert done.returncode == len(rivals), done.stderr + done.stdout
    found = run.load(tmp_path / "out" / run.FILE)
    assert [name for name, _ in found["together"][model]["turns"]] == ran
    for name in ran:
        entry = found["bench"][model][name]
        assert entry["not_as_named"] == entry["not_measured"] == {}, done.stdout
        assert sum(entry["layers"]["decoder"].values()) == 8  # qkv, o, gate_up, down; two blocks
        assert all(row["tokens_per_second"] > 0 for row in entry["decode"].values())
        # A tile of LLaVA-OneVision may be more than half of a prompt; the words fill it up.
        assert all(
            abs(row["tokens"] - int(n)) <= row["picture_tokens"] and row["pictures"] > 0
            for n, row in entry["first_token"].items()
        )
        assert entry["profile"]["prefill"]["prefill_us"] and entry["ended"]
        quantized = entry["profile"]["1"]["decode_us"]["quantized GEMM"]
        assert (quantized > 0) == (name != "bf16")
    if all_of_it:  # vLLM's CPU engine has no such kernel
        assert "ValueError" in found["bench"][model]["humming-w3a16"]["unavailable"]
        assert "==== humming-w3a16" in (tmp_path / "out" / "together-logs.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 4
    again = _run(tmp_path, *words, "--variants", "w4a8")
    assert again.stdout == "w4a8: measured before\n"


@pytest.mark.slow
def test_demo_and_its_reference_on_the_cpu_engine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    words = ["--names", "llava-w4a8-rtn", "--questions", "16"]
    words += ["--reference", str(tmp_path / "reference.json")]
    for stage in ("reference", "demo"):
        done = _run(tmp_path, stage, *words)
        assert done.returncode == 0, done.stderr + done.stdout
    found = run.load(tmp_path / "out" / run.FILE)["demo"]["llava-w4a8-rtn"]
    assert found["same_checkpoint"] and found["equal"] == 16  # the same device, twice
    assert any("QigLinearMethod" in kernel for kernel in found["layers"]["decoder"])


@pytest.mark.slow
def test_throughput_and_quantization_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = ["--models", "qwen2-vl-7b"]
    for stage in (["throughput", *model, "--variants", "w4a8"],
                  ["quantize8b", *model, "--schemes", "w4a8"], ["table"]):  # fmt: skip
        done = _run(tmp_path, *stage)
        assert done.returncode == 0, done.stderr + done.stdout
    results = run.load(tmp_path / "out" / run.FILE)
    assert results["throughput"]["qwen2-vl-7b"]["w4a8"]["requests_per_second"] > 0
    assert results["quantize8b"]["qwen2-vl-7b"]["w4a8"]["blocks"] == 2
