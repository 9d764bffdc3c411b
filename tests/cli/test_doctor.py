"""doctor loads a checkpoint and compares it with what it was when it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import one_sample, tiny_model
from safetensors.torch import load_file, save_file

from qig_serve.cli import main

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    model, out = tiny_model("llava", folder / "llava"), folder / "out"
    words = ["--calib", one_sample(folder), "--method", "rtn", "--scheme", "w4a8", "--quiet"]
    assert main(["quantize", str(model), *words, "--output", str(out)]) == 0
    return out


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def change_tensors(directory: Path, name: str, change: Callable[[object], object]) -> None:
    (shard,) = [p for p in directory.glob("*.safetensors") if name in load_file(p)]
    tensors = load_file(shard)
    change(tensors[name])
    save_file(tensors, shard, {"format": "pt"})


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_as_it_was_written(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(checkpoint)]) == 0
    assert "loaded            gives exactly what it gave when it was" in capsys.readouterr().out
    assert main(["doctor", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loaded"]["sound"]
    assert main(["inspect", str(checkpoint), "--verify", "--quiet"]) == 0  # canary.json is listed


def test_generation_settings_that_no_request_can_be_answered_with(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the defaults of every request: each would have been refused."""
    # Or Ctrl-C would be blocked in the process of the tests.
    monkeypatch.setattr("qig_serve.serving.stop_signals.take_stop_signals", lambda: None)
    change_json(checkpoint / "generation_config.json", lambda c: c.update(temperature=-5))
    batch = ["-i", str(checkpoint / "config.json"), "-o", str(checkpoint / "out.jsonl")]
    for command in (["doctor"], ["serve"], ["generate", *batch]):
        assert main([*command, str(checkpoint)]) == 2
        assert "generation_config.json: temperature is -5, and must be" in capsys.readouterr().err


def other_scale(d: Path) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight_scale"
    change_tensors(d, name, lambda t: t.mul_(1.5))


def other_tower(d: Path) -> None:
    name = "multi_modal_projector.linear_1.weight"
    change_tensors(d, name, lambda t: t.zero_())


def other_rope(d: Path) -> None:
    def change(config: dict) -> None:
        config["text_config"]["rope_parameters"]["rope_theta"] = 10.0

    change_json(d / "config.json", change)


def other_pixels(d: Path) -> None:
    def change(config: dict) -> None:
        config["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]

    change_json(d / "processor_config.json", change)


def other_template(d: Path) -> None:
    path = d / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|endoftext|>"))


def other_record(d: Path) -> None:
    change_json(d / "canary.json", lambda r: r["last_hidden"].pop())


@pytest.mark.parametrize(
    "spoil",
    [other_scale, other_tower, other_rope, other_pixels, other_template, other_record],
)
def test_another_model(
    checkpoint: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(checkpoint)
    assert main(["doctor", str(checkpoint)]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("loaded            WRONG") and "does not give what it gave" in line
    assert main(["doctor", str(checkpoint), "--no-load"]) == 0
    assert "not compared (--no-load)" in capsys.readouterr().out


def test_sizes_that_do_not_fit(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(config: dict) -> None:
        config["image_processor"]["crop_size"] = {"height": 42, "width": 42}

    change_json(checkpoint / "processor_config.json", change)
    assert main(["doctor", str(checkpoint)]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "WRONG" in line and "the model cannot compute a sample" in line


def test_a_record_that_is_damaged_or_gone(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "canary.json").write_text('{"last_hidden": "no"}')
    assert main(["doctor", str(checkpoint)]) == 1
    assert "canary.json is damaged" in capsys.readouterr().out
    (checkpoint / "canary.json").unlink()
    assert main(["doctor", str(checkpoint)]) == 0
    assert "not compared: there is no canary.json" in capsys.readouterr().out
