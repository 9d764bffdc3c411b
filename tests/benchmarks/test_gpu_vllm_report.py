"""Tables, goals and plot of `make gpu-vllm`.

The figures in `made_up` are made up: they test what is written, and say nothing about anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_vllm
import gpu_vllm_report as report
import gpu_vllm_run as run
import pytest

CARD = {"card": "Made up card", "date": "2000-01-01", "versions": {"vllm": "0.26.0"}}


def entry(rate: float, first: float, kernel: str) -> dict[str, Any]:
    """What an engine measured: tokens per second at batch 1 (a batch of 32 has 16 times that)."""
    return {
        "start_up": {"import_seconds": 5.0, "engine_seconds": 55.0},
        "layers": {"decoder": {kernel: 112}, "elsewhere": {}},
        "decode": {"1": {"tokens_per_second": rate}, "32": {"tokens_per_second": 16 * rate}},
        "first_token": {"1024": {"ms": first}, "4096": {"ms": 4 * first}},
        "memory": {"weights": 5 << 30, "kv_cache": 1 << 30, "peak": 7 << 30,
                   "peak_without_kv_cache": 6 << 30},
        "started_beside": 5, "profile": {}, "not_measured": {}, "not_as_named": {},
        "machine": CARD,
    }  # fmt: skip


def made_up() -> dict[str, Any]:
    qwen = {
        "bf16": entry(100, 50, "UnquantizedLinearMethod"),
        "w3a16": entry(310, 60, "QigLinearMethod: Triton w3a16"),
        "w4a8": entry(300, 40, "QigLinearMethod: Triton w4a8"),
        "humming-w3a16": entry(350, 70, "CompressedTensorsWNA16: HummingLinearKernel"),
        "humming-w4a8": entry(100, 1, "CompressedTensorsWNA8Int: MarlinLinearKernel"),
        "marlin-w4a16": {"unavailable": "ValueError: made up", "machine": CARD},
    }
    qwen["humming-w4a8"]["not_as_named"] = {"layers": ["MarlinLinearKernel"]}
    qwen["w3a16"]["profile"] = {
        "1": {"decode_us": {"quantized GEMM": 60.0, "norm": 15.0, "other": 25.0},
              "lm_head_us": 20.0},
        "prefill": {"tokens": 4096, "prefill_us": {"attention": 1000.0}},
    }  # fmt: skip
    return {
        "bench": {"qwen2-vl-7b": qwen},
        "throughput": {"qwen2-vl-7b": {
            "bf16": {"requests_per_second": 10.0, "machine": CARD},
            "w4a8": {"requests_per_second": 13.0, "machine": CARD},
        }},
        "quantize8b": {"internvl2-8b": {"w3a16": {
            "seconds": 300.0, "goal_seconds": 360.0, "samples": 128, "machine": CARD,
            "peak_device_bytes": 20 << 30, "peak_process_bytes": 1,
        }}},
    }  # fmt: skip


def test_goals_met_and_missed() -> None:
    reached = {goal: (seen, met) for goal, seen, met in report.goals(made_up())}
    assert reached["qwen2-vl-7b: w3a16 decodes 2.2x bf16 at batch 1"] == ("3.10x", True)
    assert reached["qwen2-vl-7b: w4a8 decodes 1.8x bf16 at batch 32"] == ("3.00x", True)
    assert reached["qwen2-vl-7b: w4a8 answers 1.4x as many requests as bf16"] == ("1.30x", False)
    first = reached["qwen2-vl-7b: w4a8 has the first of 4096 tokens 1.35x as soon"]
    assert first == ("1.25x", False)
    ahead = reached["qwen2-vl-7b: w3a16 ahead of humming-w3a16, decode at batch 1"]
    assert ahead == ("0.89x", False)
    assert reached["internvl2-8b: quantized to w3a16 within 360 s"] == ("300 s", True)
    # What ran another kernel, or on another card, or not at all, is compared with nothing.
    assert not any("humming-w4a8" in goal or "marlin" in goal for goal in reached)
    moved = made_up()
    moved["bench"]["qwen2-vl-7b"]["bf16"]["machine"] = {**CARD, "card": "another"}
    assert not any("bf16" in g for g, _, _ in report.goals(moved) if "requests" not in g)


def test_tiny_models_reach_no_goal(tmp_path: Path) -> None:
    options = gpu_vllm.arguments(["--device", "cpu", "--tiny"])
    card = run.machine(options)["card"]
    assert card == "CPU, tiny models" and run.machine(options)["versions"]["torch"]
    results = made_up()
    results["quantize8b"]["internvl2-8b"]["w3a16"]["machine"] = {**CARD, "card": card}
    assert list(report.goals(results)) == [] != list(report.goals(made_up()))


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / run.FILE).write_text(json.dumps(made_up()))
    assert gpu_vllm.main(["--out", str(tmp_path), "table", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| w3a16 | 310 (3.10x) | 4960 (3.10x) | 60 (0.83x) | 240 (0.83x) |" in text
    assert "(**not as named**)" in text
    assert "marlin-w4a16 could not run: ValueError: made up" in text
    assert "| (of it lm_head) | 20 (20%) |" in text
    assert "| quantized GEMM | 60 (60%) |" in text
    assert "took 300 s and 20.0 GiB at most" in text
    assert "Start-up is of engines that started beside 5 others." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") > 2 for line in rows)


def test_nothing_measured_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_vllm.main(["--out", str(tmp_path), "table"]) == 0
    assert capsys.readouterr().out == "nothing was measured yet\n"
    assert gpu_vllm.main(["--out", str(tmp_path), "plot"]) == 1
    assert "run together first" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    path = report.plot(made_up(), tmp_path / "sub" / "plot.png")
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000
