"""LoRA adapters that do not fit are refused before the engine starts."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from qig_serve.errors import UserError
from qig_serve.manifest import QuantizationConfig
from qig_serve.serving.adapters import check_adapters

ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/models/source",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
}


def manifest(method: str = "rtn", **recipe: Any) -> QuantizationConfig:
    return QuantizationConfig(
        quant_method="qig",
        format_version=1,
        scheme="w4a8",
        bits=4,
        group_size=None,
        ignore=[],
        method=method,
        recipe=recipe,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model-w4a8"
    directory.mkdir()
    config = {"architectures": ["LlavaForConditionalGeneration"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def arguments(folder: Path | str, **changes: Any) -> Namespace:
    """Of a server with one adapter, whose configuration has these changes."""
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    modules = [SimpleNamespace(name="mine", path=str(folder))]
    return Namespace(enable_lora=True, lora_modules=modules, max_lora_rank=16)


def test_an_adapter_that_fits(checkpoint: Path, tmp_path: Path) -> None:
    assert check_adapters(checkpoint, manifest(), arguments(tmp_path / "a")) is None
    assert check_adapters(checkpoint, manifest(), arguments("someone/adapter")) is None
    off = Namespace(enable_lora=False)
    assert check_adapters(checkpoint, manifest("qig+"), off) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 64}, "LoRA rank 64 is greater than max_lora_rank 16"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "Adapter bias is not supported"),
        ({"r": "x"}, "adapter_config"),
    ],
    ids=["rank", "dora", "bias", "no-number"],
)
def test_what_vllm_refuses_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"the adapter mine .*{message}"):
        check_adapters(checkpoint, manifest(), arguments(tmp_path / "a", **changes))


def test_no_adapter_there(checkpoint: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", checkpoint):
        modules = [SimpleNamespace(name="mine", path=str(path))]
        args = Namespace(enable_lora=True, lora_modules=modules, max_lora_rank=16)
        with pytest.raises(UserError, match=r"the adapter mine: .* has no adapter_config\.json"):
            check_adapters(checkpoint, manifest(), args)


def test_a_model_that_takes_none(checkpoint: Path, tmp_path: Path) -> None:
    config = {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="vLLM's LlavaOnevision.* takes no LoRA adapters: merge"):
        check_adapters(checkpoint, manifest(), arguments(tmp_path / "a"))


@pytest.mark.parametrize(
    ("used", "fits"),
    [
        (manifest("gptq"), True),
        (manifest("qig+", equalize="none"), True),
        (manifest("qig+"), False),
        (manifest("awq", equalize="search"), False),
    ],
    ids=["gptq", "qig+-without", "qig+", "awq"],
)
def test_rescaled_channels_need_an_adapter_of_their_own(
    checkpoint: Path, tmp_path: Path, used: QuantizationConfig, fits: bool
) -> None:
    """One of the source model would answer wrongly, and nothing would say so."""
    args = arguments(tmp_path / "a")
    if fits:
        assert check_adapters(checkpoint, used, args) is None
        return
    with pytest.raises(UserError, match="trained on /models/source, and .* rescaled"):
        check_adapters(checkpoint, used, args)
    own = arguments(tmp_path / "a", base_model_name_or_path=str(checkpoint))
    assert "rescaled this checkpoint's channels" in str(check_adapters(checkpoint, used, own))


def test_an_adapter_of_the_mlp_needs_the_mlp_it_was_trained_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    padded = manifest("gptq").model_copy(update={"summary": {"mlp_channels": 29696}})
    assert check_adapters(checkpoint, padded, arguments(tmp_path / "a")) is None
    for targets in (["q_proj", "mlp.up_proj"], "all-linear"):
        given = arguments(tmp_path / "a", target_modules=targets)
        assert check_adapters(checkpoint, manifest("gptq"), given) is None
        with pytest.raises(UserError, match="29696 in all, .* --no-pad-mlp"):
            check_adapters(checkpoint, padded, given)
