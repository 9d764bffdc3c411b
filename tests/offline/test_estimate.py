"""Before hours of work: the dry run finds what would fail, and estimates memory and time."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qig_serve.errors import UserError
from qig_serve.offline import estimate, pipeline
from qig_serve.offline.estimate import BlockSeconds, Estimate, bytes_per_token, heaviest
from qig_serve.offline.progress import duration
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.results import QuantizationReport
from qig_serve.offline.source.loaded_model import load


def recipe(calib: str) -> QuantRecipe:
    return QuantRecipe(calib=calib, samples=7, grid=5, device="cpu", method="qig")


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the work has begun")


def test_counts_and_estimate_are_printed(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pipeline.quantize(tiny_llava, tmp_path / "out", recipe(seven_samples))
    said, *lines = capsys.readouterr().err.splitlines()
    assert said.startswith("in 8 bits: ") and said.endswith("lm_head")
    counts = report.calibration["tokens"]
    assert counts["image"] == 7 * 36 and counts["text"] > 7
    assert lines[0] == (
        f"calibration: 7 samples with 7 images: {counts['image']} image, {counts['text']} text and "
        f"{counts['special']} template tokens"
    )
    assert lines[1].startswith("dry run of one block on the longest sample, ")
    assert lines[2].startswith("estimate: about ") and " for 2 blocks, " in lines[2]
    assert "GiB host memory" in lines[2]
    assert 0 < report.estimate["seconds"] < 600 and report.estimate["host_bytes"] > 50e6
    stored = (tmp_path / "out" / "report.json").read_text()
    assert QuantizationReport.model_validate_json(stored).estimate == report.estimate
    # The log holds the same lines, each with the time, and the steps inside the blocks.
    log = (tmp_path / "out" / pipeline.LOG_FILE).read_text().splitlines()
    logged = [line.split("  ", 1)[1] for line in log]
    assert logged[:4] == [said, *lines[:3]]
    assert "block 1/2: equalization of qkv" in logged
    assert [line for line in lines if line.startswith("block")] == [
        line for line in logged if "output error" in line
    ]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
    ids=["gpu", "cpu"],
)
def test_too_little_memory_is_found_at_once(
    tiny_llava: Path,
    seven_samples: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(estimate, "round_block", fail)
    monkeypatch.setattr(pipeline, "quantize_blocks", forbidden)
    with pytest.raises(
        UserError, match=r"dry run on calibration sample .* tokens\) ran out of mem"
    ):
        pipeline.quantize(tiny_llava, tmp_path / "out", recipe(seven_samples), quiet=True)
    assert not list(tmp_path.iterdir())


def test_what_fewer_tokens_do_not_save_is_said(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(estimate, "round_block", fail)
    ours = QuantRecipe(calib=seven_samples, samples=7, device="cpu")
    with pytest.raises(UserError, match=r"images; second moments of the 256 inputs of its widest"):
        pipeline.quantize(tiny_llava, tmp_path / "out", ours, quiet=True)


def test_other_errors_are_not_called_memory(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(estimate, "round_block", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        pipeline.quantize(tiny_llava, tmp_path / "out", recipe(seven_samples), quiet=True)


def test_wrong_values_are_found_at_once(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qig_serve.offline.passes import capture

    def infinite(output: Any) -> torch.Tensor:
        return torch.full_like(capture.first_output(output), math.inf)

    monkeypatch.setattr("qig_serve.offline.passes.streams.first_output", infinite)
    monkeypatch.setattr(pipeline, "quantize_blocks", forbidden)
    with pytest.raises(UserError, match=r"layer 0, .* output: NaN or infinity"):
        pipeline.quantize(tiny_llava, tmp_path / "out", recipe(seven_samples), quiet=True)
    assert not list(tmp_path.iterdir())


def batch(samples: int, tokens: int) -> Any:
    return SimpleNamespace(token_mask=torch.ones(samples, tokens, dtype=torch.bool))


def test_longest_and_fullest() -> None:
    long, full, short = batch(1, 90), batch(4, 50), batch(8, 10)
    assert heaviest([short, full, long]) == [long, full]
    assert heaviest([long, short]) == [long]


def test_what_grows_with_the_tokens() -> None:
    seconds = BlockSeconds(1, 2, 3, 4, 5, 6, load=7, candidates=8, rounding=9)
    assert seconds.scaled(10) == 10 * (1 + 2 + 3 + 4 + 5 + 6) + 7 + 8 + 9


def test_the_answers_gradients_are_counted(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait, 128 channels in 16 bits behind each of 2 blocks, and the times they take."""
    timed: list[BlockSeconds] = []

    def kept(*args: Any) -> BlockSeconds:
        timed.append(estimate_time(*args))
        return timed[-1]

    estimate_time = estimate.time_block
    monkeypatch.setattr(estimate, "time_block", kept)
    monkeypatch.setattr(estimate, "host_bytes", lambda: 0)
    monkeypatch.setattr("qig_serve.offline.passes.output_gradients.MOST_DRAWS", 3)
    reports = [
        pipeline.quantize(
            tiny_llava,
            tmp_path / rounding,
            QuantRecipe(calib=seven_samples, samples=7, device="cpu", rounding=rounding),
            quiet=True,
        )
        for rounding in ("qronos", "qronos-outputs")
    ]
    assert timed[0].outputs == 0 < timed[1].outputs
    without, with_them = (report.estimate["host_bytes"] for report in reports)
    tokens = sum(reports[0].calibration["tokens"].values())
    assert with_them - without == 3 * 2 * 2 * 128 * tokens
    assert reports[0].sweep_seconds == 0 < reports[1].sweep_seconds


def test_activations_a_token(tiny_llava: Path) -> None:
    """Both streams (128 channels each) and the widest group: down, 256 in and 128 out; w4a8 keeps
    the quantized prefix's inputs too."""
    loaded = load(tiny_llava)
    sizes = {
        name: bytes_per_token(loaded, QuantRecipe(**{"calib": "demo", "method": "qig", **more}))
        for name, more in {
            "w3a16": {},
            "w4a8": {"scheme": "w4a8"},
            "rtn": {"method": "rtn"},
        }.items()
    }
    assert sizes == {
        "w3a16": 4 * (2 * 128 + 256 + 128),
        "w4a8": 4 * (2 * 128 + 2 * 256 + 128),
        "rtn": 4 * 2 * 128,
    }


def test_an_estimate_that_does_not_fit_says_so() -> None:
    fits = Estimate(50.0, 1 << 30, 0, 0).line(28, torch.device("cpu"))
    assert fits.startswith("estimate: about 50 s for 28 blocks, 1.0 GiB of ")
    assert "too much" not in fits
    assert "use --offload disk" in Estimate(50.0, 1 << 50, 0, 0).line(28, torch.device("cpu"))
    assert "3.0 GiB of disk" in Estimate(50.0, 1, 3 << 30, 0).line(28, torch.device("cpu"))
    assert [duration(s) for s in (7, 600, 7200)] == ["7 s", "10 min", "2.0 h"]
