"""Valid tensor-parallel sizes, and the reasons against the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_models import FAMILIES, tiny_model

from qig_serve.cli import main
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.tensor_parallel import SIZES, refused_sizes, told_sizes


def config_of(
    heads: int, kv: int, hidden: int, intermediate: int, model_type: str = "x", **vision: int
) -> Any:
    text = SimpleNamespace(
        num_attention_heads=heads,
        num_key_value_heads=kv,
        hidden_size=hidden,
        intermediate_size=intermediate,
    )
    return SimpleNamespace(
        get_text_config=lambda: text, vision_config=SimpleNamespace(**vision), model_type=model_type
    )


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (config_of(28, 4, 3584, 18944, num_heads=16), [1, 2, 4]),  # Qwen2.5-VL-7B
        (config_of(64, 8, 8192, 29568, num_heads=16), [1]),  # Qwen2.5-VL-72B: 231 groups
        (config_of(64, 8, 8192, 29696, num_heads=16), [1, 2, 4, 8]),  # the same, padded to 232
        (config_of(32, 8, 4096, 14336, "internvl", num_attention_heads=16), [1, 2, 4, 8, 16]),
        (config_of(32, 8, 4096, 14336, "internvl", num_attention_heads=25), [1, 2, 4, 8, 16]),
        (config_of(32, 8, 4096, 14336, "llava", num_attention_heads=12), [1, 2, 4]),
        (config_of(4, 2, 256, 768), [1, 2]),
    ],
    ids=["qwen-7b", "qwen-72b", "qwen-72b-padded", "internvl-8b", "internvl-26b", "tower", "demo"],
)
def test_sizes(config: Any, sizes: list[int]) -> None:
    refused = refused_sizes(config, 128)
    assert [size for size in SIZES if size not in refused] == sizes


def test_reasons_are_named() -> None:
    refused = refused_sizes(config_of(28, 4, 3584, 18944, num_heads=12), 128)
    assert refused[8] == (
        "28 query heads, 3584 inputs of o in groups of 128, 18944 inputs of down in groups of "
        "128, 12 heads of the vision tower cannot be split 8 ways"
    )
    assert told_sizes([1, 2], {"4": "why"}) == "1, 2; not 4 (why)"


def test_recorded_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    content = [{"type": "image_url", "image_url": {"url": "red.png"}}]
    line = {"id": "1", "messages": [{"role": "user", "content": content}], "answer": "red"}
    (tmp_path / "calib.jsonl").write_text(json.dumps(line) + "\n")
    assert "llava" in FAMILIES
    source = tiny_model("llava", tmp_path / "source")
    options = {"method": "rtn", "calib": str(tmp_path / "calib.jsonl"), "samples": 1}
    quantize(source, tmp_path / "out", make_recipe(options), quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["tensor_parallel_sizes"] == [1, 2]
    assert list(config["summary"]["tensor_parallel_refused"]) == ["4", "8", "16"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "tensor parallel 1, 2; not 4 (256 inputs of o in groups of 128, " in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Tensor-parallel sizes: 1, 2; not 4 (256 inputs of o" in card
