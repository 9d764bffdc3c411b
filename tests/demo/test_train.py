"""The training program: a few seconds of it, stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qig_serve.cli import main
from qig_serve.demo.model import load_model
from qig_serve.demo.train import CHECKPOINT, MasterAdamW, Settings, learning_rate, train


def test_schedule_goes_by_time() -> None:
    settings = Settings(minutes=10, vision_share=0.1, warmup_share=0.1)
    assert learning_rate(settings, 0.0) == (0.0, True)
    assert learning_rate(settings, 59.0) == (settings.vision_rate, True)
    assert learning_rate(settings, 60.0) == (0.0, False)
    assert learning_rate(settings, 120.0)[0] == pytest.approx(settings.rate)
    assert 0 < learning_rate(settings, 599.0)[0] < settings.rate / 100
    assert learning_rate(settings, 700.0)[0] == 0.0


def test_masters_keep_what_bf16_loses() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    bias = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("weight", weight), ("bias", bias)], decay=0.0)
    assert weight.dtype == torch.bfloat16
    for _ in range(40):  # a step is far below the distance between bf16 numbers near 1
        (weight.float().sum() + bias.float().sum()).backward()
        optimizer.step(1e-4, 1)
    assert weight[0, 0] == torch.tensor(1 - 40e-4).bfloat16()
    assert bias[0] == weight[0, 0]


@pytest.mark.slow
def test_training_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = {"pictures": 2, "vision_pictures": 2, "dev_samples": 8, "vision_share": 0.4}
    try:
        train(tmp_path, minutes=0.04, processes=1, **options)
        first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        minutes = first["elapsed"] / 60 + 0.06
        folder = train(tmp_path, minutes=minutes, processes=1, resume=True, **options)
    finally:
        torch.set_num_threads(threads)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] > 0 and second["elapsed"] >= minutes * 60
    assert all(now > 0 for now in second["seen"])
    assert "exact match" in capsys.readouterr().out
    model, _ = load_model(folder)
    plain, _ = load_model(tmp_path / "plain")
    assert model.dtype == torch.bfloat16
    name = "model.language_model.layers.0.input_layernorm.weight"
    assert (model.state_dict()[name] / plain.state_dict()[name] == 8).sum() == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "more than 0 minutes"),
        (["--minutes", "nan"], "more than 0 minutes"),
        (["--processes", "0"], "at least 1 process"),
        (["--model", "gpt"], "no demonstration model 'gpt': the models are llava"),
        (["--start-from", "gone"], "the model directory gone does not exist"),
    ],
)
def test_settings_that_nothing_can_be_trained_with(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "train", "--output", str(out), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not out.exists()


def test_a_training_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"hours of work")
    assert main(["demo", "train", "--output", str(tmp_path)]) == 2
    assert "holds a training: go on with --resume" in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == b"hours of work"
