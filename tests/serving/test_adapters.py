"""LoRA adapters that do not fit are refused before the engine starts."""

from __future__ import annotations

import codecs
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from qig_serve.errors import UserError
from qig_serve.inspection import Inspection, QuantizedLinear, StoredTensor
from qig_serve.manifest import QuantizationConfig
from qig_serve.serving.adapter_tensors import TENSORS_FILE, Adaptable, adaptable, check_tensors
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
    return given(modules)


def given(modules: list[SimpleNamespace], **changes: Any) -> Namespace:
    """What adapters look at of vLLM's arguments."""
    usual = {"enable_lora": True, "max_lora_rank": 16, "default_mm_loras": None}
    usual |= {"served_model_name": ["model"], "model": "/models/model"}
    return Namespace(lora_modules=modules, **usual | changes)


def test_an_adapter_that_fits(checkpoint: Path, tmp_path: Path) -> None:
    assert check_adapters(checkpoint, manifest(), arguments(tmp_path / "a")) is None
    assert check_adapters(checkpoint, manifest(), arguments("someone/adapter")) is None
    off = given([], enable_lora=False)
    assert check_adapters(checkpoint, manifest("qig+"), off) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 64}, "LoRA rank 64 is greater than max_lora_rank 16"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "Adapter bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": "x"}, "a rank is 'x', and no whole number: save"),
        ({"r": 8.0}, "a rank is 8.0"),
        ({"lora_alpha": float("nan")}, "an alpha is nan, and no number: save"),
        ({"use_rslora": "false"}, "use_rslora is 'false', neither true nor false"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', .*: merge"),
        ({"rank_pattern": [8]}, "rank_pattern is not a table"),
        ({"rank_pattern": {"q_proj(": 8}}, "rank_pattern is not a table"),
        ({"rank_pattern": {"q_proj": "8"}}, "a rank is '8'"),
        ({"alpha_pattern": {"q_proj": "8"}}, "an alpha is '8'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is .*passes over: merge"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_vllm_refuses_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"the adapter mine .*{message}"):
        check_adapters(checkpoint, manifest(), arguments(tmp_path / "a", **changes))


def test_what_an_older_vllm_passes_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.26 reads no patterns: it would scale a module of another rank by the usual one."""
    from qig_serve.vllm_plugin import compat

    @dataclass
    class Helper:
        r: int = 8

    monkeypatch.setattr(compat, "adapter_config", lambda: Helper)
    for changes in ({"alpha_pattern": {"q_proj": 32}}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UserError, match="which this vLLM passes over: merge"):
            check_adapters(checkpoint, manifest(), arguments(tmp_path / "a", **changes))


def test_a_mark_in_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    with pytest.raises(UserError, match="begins with a byte-order mark"):
        check_adapters(checkpoint, manifest(), args)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["model"], {}, "the adapter model has the name of the model itself"),
        (["/models/model"], {"served_model_name": None}, "has the name of the model itself"),
        (["mine", "mine"], {}, "two adapters have the name mine"),
        (["image"], {"default_mm_loras": {"image": "/a"}}, "two adapters have the name image"),
        ([""], {}, "an adapter has no name: write NAME=DIR"),
        (["mine"], {"enable_lora": False}, "the adapter mine: .* without --enable-lora"),
        ([], {"enable_lora": False, "default_mm_loras": {"image": "/a"}}, "without --enable-lora"),
        ([], {"default_mm_loras": {"image": "/a"}}, "the adapter image: /a has no adapter_config"),
    ],
)
def test_names_of_adapters(
    checkpoint: Path, names: list[str], changes: dict[str, Any], message: str
) -> None:
    """vLLM says so after the engine's minutes, or answers with another adapter or none."""
    args = given([SimpleNamespace(name=name, path="/a/b/c") for name in names], **changes)
    with pytest.raises(UserError, match=message):
        check_adapters(checkpoint, manifest(), args)


def test_no_adapter_there(checkpoint: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", checkpoint):
        modules = [SimpleNamespace(name="mine", path=str(path))]
        with pytest.raises(UserError, match=r"the adapter mine: .* has no adapter_config\.json"):
            check_adapters(checkpoint, manifest(), given(modules))


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
        args = arguments(tmp_path / "a", target_modules=targets)
        assert check_adapters(checkpoint, manifest("gptq"), args) is None
        with pytest.raises(UserError, match="29696 in all, .* --no-pad-mlp"):
            check_adapters(checkpoint, padded, args)


LAYER = "base_model.model.model.language_model.layers.1"
GOOD = {
    f"{LAYER}.self_attn.q_proj.lora_A.weight": (8, 256),
    f"{LAYER}.self_attn.q_proj.lora_B.weight": (256, 8),
}


@pytest.fixture(scope="module")
def names() -> tuple[Any, Any]:
    """vLLM's own, of LLaVA."""
    from qig_serve.vllm_plugin import compat

    model = compat.model_registry().models["LlavaForConditionalGeneration"].load_model_cls()
    return compat.adapter_names(model)


def base(names: tuple[Any, Any], tower: bool = False) -> Adaptable:
    """A checkpoint with one quantized linear, a tower, and its output head in 8 bits."""
    linear = QuantizedLinear("language_model.model.layers.1.self_attn.q_proj", 256, 256, 1)
    head = QuantizedLinear("language_model.lm_head", 320, 256, 1)
    stored = StoredTensor("model.safetensors", "BF16", (1,))
    others = (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
    )
    tensors = {f"{name}.weight": stored for name in (*others, "language_model.model.norm")}
    found = Inspection(Path("m"), "llava", manifest(), tensors, [linear], [head])
    return adaptable(found, names[0], (), tower)


def changed(**shapes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """GOOD, and other tensors of q_proj by their last words; None leaves one out."""
    out: dict[str, tuple[int, ...]] = dict(GOOD)
    for last, shape in shapes.items():
        out.pop(name := f"{LAYER}.self_attn.q_proj.{last}.weight", None)
        if shape is not None:
            out[name] = shape
    return out


def rank(config: dict[str, Any] | None = None) -> Any:
    from qig_serve.vllm_plugin import compat

    return compat.adapter_ranks(ADAPTER | (config or {}))


def moved(old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {name.replace(old, new): shape for name, shape in GOOD.items()}


TENSORS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "other-inputs": (
        changed(lora_A=(8, 512)),
        r"is \[8, 512\], and the linear needs \[rank, 256\]",
    ),
    "other-outputs": (changed(lora_B=(512, 8)), r"is \[512, 8\], and .* needs \[256, rank\]"),
    "two-ranks": (changed(lora_B=(256, 4)), "has rank 4, and .* says 8"),
    "half": (changed(lora_B=None), "has no B beside it: save"),
    "flat": (changed(lora_A=(2048,)), r"is \[2048\], and the linear needs"),
    "further-layer": (moved("layers.1", "layers.9"), "which this checkpoint does not have"),
    "text-model": (moved("model.language_model.", ""), "which this checkpoint does not have"),
    "tower": (
        moved(
            "language_model.layers.1.self_attn.q_proj",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        ),
        "no linear of the decoder, .* leave it out: train .* --enable-tower-connector-lora",
    ),
    "projector": (
        moved("language_model.layers.1.self_attn.q_proj", "multi_modal_projector.linear_1"),
        "no linear of the decoder",
    ),
    "head": (
        {
            "base_model.model.lm_head.lora_A.weight": (8, 256),
            "base_model.model.lm_head.lora_B.weight": (320, 8),
        },
        "stores in 8 bits: quantize with --head 16",
    ),
    "adalora": (changed(lora_E=(8, 1)), "no tensor of a plain LoRA adapter: merge"),
    "dora": (changed(lora_magnitude_vector=(256,)), "no tensor of a plain LoRA adapter: merge"),
    "saved-module": (moved("lora_A", "original_module"), "no tensor of a plain LoRA"),
    "of-other-rank": (changed(lora_A=(4, 256), lora_B=(256, 4)), "has rank 4, and .* says 8"),
    "of-no-rank": (changed(lora_A=(0, 256), lora_B=(256, 0)), "has rank 0, and .* says 8"),
    "by-two-names": (
        GOOD | moved("model.language_model.layers", "language_model.model.layers"),
        "one tensor by two names",
    ),
    "nothing": ({}, "holds no tensors"),
}


def write(folder: Path, shapes: dict[str, tuple[int, ...]], value: float = 1.0) -> Path:
    save_file({n: torch.full(s, value) for n, s in shapes.items()}, folder / TENSORS_FILE)
    return folder


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_vllm_would_leave_out(
    tmp_path: Path, names: tuple[Any, Any], case: str
) -> None:
    shapes, message = TENSORS[case]
    with pytest.raises(UserError, match=f"the adapter mine: .*{message}") as caught:
        check_tensors(write(tmp_path, shapes), base(names), names[1], rank(), "the adapter mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [GOOD, moved("model.language_model.layers", "language_model.model.layers")],
    ids=["transformers-5", "transformers-4"],
)
def test_tensors_that_fit(tmp_path: Path, names: tuple[Any, Any], shapes: Any) -> None:
    check_tensors(write(tmp_path, shapes), base(names), names[1], rank(), "the adapter mine")


def test_ranks_by_pattern(tmp_path: Path, names: tuple[Any, Any]) -> None:
    folder = write(tmp_path, changed(lora_A=(4, 256), lora_B=(256, 4)))
    check_tensors(folder, base(names), names[1], rank({"rank_pattern": {"q_proj": 4}}), "mine")


def test_the_tower_on_request(tmp_path: Path, names: tuple[Any, Any]) -> None:
    check_tensors(write(tmp_path, TENSORS["tower"][0]), base(names, True), names[1], rank(), "mine")


def test_files_of_tensors(tmp_path: Path, names: tuple[Any, Any]) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            check_tensors(tmp_path, base(names), names[1], rank(), "mine")

    refused("has no adapter_model.safetensors: copy it")
    (tmp_path / "adapter_model.bin").touch()
    refused("pickle form .adapter_model.bin.*save_pretrained")
    (tmp_path / TENSORS_FILE).write_bytes(b"\0" * 20)
    refused("is damaged .*: copy it again")
    (tmp_path / TENSORS_FILE).write_text("version https://git-lfs.github.com/spec/v1")
    refused("is a pointer of Git LFS")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({n: torch.ones(s).to(dtype) for n, s in GOOD.items()}, tmp_path / TENSORS_FILE)
        refused(f"is {str(dtype)[6:]}, and adapters are floating point of 16 or 32 bits")
    write(tmp_path, GOOD, float("nan"))
    refused("holds NaN or infinity: its training failed")


HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.language_model.embed_tokens"
ON_TABLES = {
    f"{HEAD}.lora_A.weight": (8, 16),
    f"{HEAD}.lora_B.weight": (32, 8),
    f"{HEAD}.base_layer.weight": (32, 16),
    f"{EMBEDDING}.lora_embedding_A": (8, 32),
    f"{EMBEDDING}.lora_embedding_B": (16, 8),
    f"{EMBEDDING}.base_layer.weight": (32, 16),
}


@pytest.mark.parametrize(
    ("changes", "adapted", "message"),
    [
        ({}, True, None),
        ({}, False, "no linear of the decoder, and vLLM would leave it out"),
        ({f"{HEAD}.lora_B.weight": (40, 8)}, True, r"is \[40, 8\], .* needs \[32, rank\]"),
        ({f"{EMBEDDING}.lora_embedding_A": (8, 40)}, True, r"\[8, 40\], .* needs \[rank, 32\]"),
        ({f"{EMBEDDING}.base_layer.weight": (40, 16)}, True, "not the one of this checkpoint"),
    ],
    ids=["fits", "not-in-this-decoder", "head", "embedding", "resized"],
)
def test_adapters_of_head_and_embedding(
    tmp_path: Path,
    names: tuple[Any, Any],
    changes: dict[str, tuple[int, ...]],
    adapted: bool,
    message: str | None,
) -> None:
    tables = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    save_file({n: torch.ones(32, 16, dtype=torch.bfloat16) for n in tables}, tmp_path / "base")
    stored = {n: StoredTensor("base", "BF16", (32, 16)) for n in tables}
    found = Inspection(tmp_path, "llava", manifest(), stored, [])
    model = adaptable(found, names[0], ("lm_head", "embed_tokens") if adapted else (), False)
    write(tmp_path, ON_TABLES | changes)
    if message is None:
        check_tensors(tmp_path, model, names[1], rank(), "mine")
        write(tmp_path, ON_TABLES, 2.0)
        message = "base_layer.weight in .* is not the one of this checkpoint"
    with pytest.raises(UserError, match=message):
        check_tensors(tmp_path, model, names[1], rank(), "mine")


@pytest.mark.parametrize(
    ("architecture", "decoder", "tables"),
    [
        ("LlavaForConditionalGeneration", "llama", {"lm_head", "embed_tokens"}),
        ("LlavaForConditionalGeneration", "qwen2", set()),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl_text", {"lm_head", "embed_tokens"}),
        ("Gemma3ForConditionalGeneration", "gemma3_text", set()),
    ],
)
def test_of_which_decoders_vllm_adapts_them(
    architecture: str, decoder: str, tables: set[str]
) -> None:
    from qig_serve.vllm_plugin import compat

    model = compat.model_registry().models[architecture].load_model_cls()
    assert compat.adapted_tables(model, decoder) == tables
