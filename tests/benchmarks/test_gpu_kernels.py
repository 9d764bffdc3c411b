"""`make gpu` as far as it goes without a GPU: its arithmetic, its files, and where it stops.

The times here are made up: they test what is written, and say nothing about the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_kernels
import pytest
import torch

from qig_serve.kernels import tuning

LIMIT = {"copy_bytes_per_second": 4e12, "bf16_flops": 8e14}


def made_up_result() -> dict[str, Any]:
    """A result of every layer and number of tokens, from times that nobody measured."""
    linears = []
    for model, layers in tuning.LAYER_SHAPES.items():
        for layer, (n, k) in layers.items():
            for scheme in ("w3a16", "w4a8"):
                rows = []
                for m in gpu_kernels.TOKENS:
                    floor = gpu_kernels.floor_microseconds(scheme, m, n, k, LIMIT)
                    rivals: dict[str, dict[str, Any]] = {
                        "humming": {"us": 3 * floor},
                        "gemlite": {"unavailable": "ModuleNotFoundError: made up"},
                    }
                    row = gpu_kernels.figures(2 * floor, 4 * floor, floor, rivals)
                    rows.append({"m": m, **row})
                linears.append(
                    {"model": model, "layer": layer, "scheme": scheme, "n": n, "k": k, "rows": rows}
                )
    return {"card": "Made up card", "date": "2000-01-01", "limits": LIMIT, "linears": linears}


def test_json_and_plot_are_written(tmp_path: Path) -> None:
    path = gpu_kernels.write(made_up_result(), tmp_path / "results")
    assert path.name == "kernels-Made-up-card.json"
    written = json.loads(path.read_text())
    assert written["linears"][0]["rows"][0]["m"] == 1
    assert len(written["linears"]) == 16
    for row in written["linears"][5]["rows"]:
        assert row["fraction_of_limit"] == pytest.approx(0.5)
        assert row["speedup_over_cublas"] == pytest.approx(2)
        assert row["speedup_over_best_rival"] == pytest.approx(1.5)
    png = path.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_no_rival_is_not_a_ratio() -> None:
    row = gpu_kernels.figures(10.0, 20.0, 5.0, {"humming": {"unavailable": "made up"}})
    assert row["speedup_over_best_rival"] is None


@pytest.mark.parametrize(
    ("scheme", "m", "microseconds"),
    [
        # gate_up of Qwen2-VL-7B: 135.8 M weights, by hand
        ("w3a16", 1, (37888 * 3584 * (3 / 8 + 3 / 128) + 2 * (3584 + 37888)) / 4e12 * 1e6),
        ("w4a8", 8192, 2 * 8192 * 37888 * 3584 / 16e14 * 1e6),
    ],
)
def test_the_limit_is_the_larger_of_bytes_and_operations(
    scheme: str, m: int, microseconds: float
) -> None:
    floor = gpu_kernels.floor_microseconds(scheme, m, 37888, 3584, LIMIT)
    assert floor == pytest.approx(microseconds)


def test_rivals_that_cannot_run_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rival is installed here, and there is no GPU: each says why, and none stops the others."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    results = gpu_kernels.time_rivals("w3a16", torch.randn(128, 128), torch.randn(2, 128), False)
    assert set(results) == set(gpu_kernels.RIVALS)
    if not torch.cuda.is_available():
        assert all("unavailable" in entry for entry in results.values())
        assert "GemLite packs" in results["gemlite"]["unavailable"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_at_the_gpu_and_not_before() -> None:
    done = subprocess.run(
        [sys.executable, "-P", gpu_kernels.__file__], capture_output=True, text=True,
        env=os.environ,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no threshold passed" in done.stdout, done.stdout[-2000:]
    assert done.stderr == "everything compiles, but no CUDA device was found to run it on\n"
