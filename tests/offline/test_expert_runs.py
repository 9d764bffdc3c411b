"""Whole runs on models with experts: every method, interrupted, shared, tuned, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tensors_of
from helpers.tiny_experts import several_samples
from helpers.tiny_models import tiny_model

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.experts import unfuse
from qig_serve.formats import get_scheme
from qig_serve.inspection import require_sound
from qig_serve.offline import pipeline
from qig_serve.offline.estimate import bytes_per_token, timed_block
from qig_serve.offline.recipe import METHODS, make_recipe
from qig_serve.offline.results import QuantizationReport
from qig_serve.offline.source.loaded_model import load
from qig_serve.packing import unpack_linear

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"num_experts": 4, "moe_intermediate_size": 96}
DECODER = "model.language_model.layers."
FAMILIES = {
    "qwen3_vl_moe": ["qkv", "o", "gate_up", "experts_down"],
    "qwen3_5_moe": ["qkv", "o", "gate_up", "down", "experts_down"],
    "glm4v_moe": ["qkv", "o", "gate_up", "down", "experts_down"],
    "gemma4_moe": ["qk", "o", "gate_up", "down", "experts_gate_up", "experts_down"],
}
"""Tiny model -> the smoothing groups of its last block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of few and narrow experts, and calib.jsonl."""
    folder = tmp_path_factory.mktemp("experts")
    for family in FAMILIES:
        text = {"n_routed_experts": TEXT["num_experts"], **TEXT} if family == "glm4v_moe" else TEXT
        tiny_model(family, folder / family, **text)
    several_samples(folder)
    return folder


def quantized(folder: Path, out: Path, family: str = "qwen3_vl_moe", **more: Any) -> Any:
    resume = more.pop("resume", False)
    fields = {"calib": str(folder / "calib.jsonl"), "samples": 4, "grid": 3, "device": "cpu"}
    recipe = make_recipe({**fields, "allow_fallbacks": True, **more})
    return pipeline.quantize(folder / family, out, recipe, resume=resume, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(folder: Path, tmp_path: Path, family: str, scheme: str, method: str) -> None:
    """The canary has read each back; what is better than rounding to nearest is, on samples."""
    report = quantized(folder, tmp_path / "out", family, scheme=scheme, method=method)
    blocks = report.blocks
    dense = 1 if family == "glm4v_moe" else 0
    seen = [block.experts is not None for block in blocks]
    assert seen == [False] * dense + [method != "rtn"] * (len(blocks) - dense)
    names = [m.name for m in blocks[-1].modules]
    searched = METHODS[method]["equalize"] != "none"
    if searched:
        assert names == FAMILIES[family]


def test_plain_transformers_has_the_weights_of_the_codes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits of the checkpoint, reloaded, are those of the source with the codes' weights."""
    from transformers import AutoModelForImageTextToText

    from qig_serve.transformers_plugin import load_dequantized

    quantized(folder, tmp_path / "out", method="gptq", head=8, embeddings=8)
    tensors = tensors_of(tmp_path / "out")
    assert not [n for n in tensors if "gate_up_proj" in n or n.endswith("experts.down_proj")]
    assert f"{DECODER}0.mlp.experts.3.up_proj.weight_packed" in tensors
    assert main(["inspect", str(tmp_path / "out")]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    experts = sum(name.endswith("up_proj.weight_packed") for name in tensors)
    assert [row[1] for row in table if row[:1] == ["experts.*.up_proj"]] == [str(experts)]
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert written["norm_topk_prob"] is True  # vLLM asks for it
    assert tensors[f"{DECODER}0.mlp.gate.weight"].dtype == torch.bfloat16
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder / "qwen3_vl_moe", dtype=torch.float32
    )
    unfuse(model)
    found = load_dequantized(tmp_path / "out")
    scheme = get_scheme("w3a16")
    for name, parameter in model.named_parameters():
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_packed" in tensors and name.startswith(DECODER):
            suffixes = ("weight_packed", "weight_scale", "weight_zero_point")
            parameter.data = unpack_linear({s: tensors[f"{linear}.{s}"] for s in suffixes}, scheme)
        elif name in tensors:
            parameter.data = tensors[name].float()
    for module, other in ((model.lm_head, found.lm_head),):
        module.weight.data = other.weight.data
    model.set_input_embeddings(found.get_input_embeddings())
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    stored = require_sound(tmp_path / "out")
    assert len(stored.linears) == 3 * (4 + 3 * TEXT["num_experts"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 128
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    wrong = r"experts\.0\.down_proj: 256 x 96, but config\.json asks for 256 x 128"
    with pytest.raises(UserError, match=wrong):
        require_sound(tmp_path / "out")


def test_blocks_before_those_with_experts(folder: Path, tmp_path: Path) -> None:
    """The estimate goes by a block with experts; a checkpoint is checked by kinds of blocks."""
    assert timed_block(load(folder / "glm4v_moe")) == 1
    quantized(folder, tmp_path / "out", "glm4v_moe", method="rtn")
    require_sound(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for field, value, wrong in (
        ("n_shared_experts", 2, r"shared_experts\.down_proj: 256 x 96, .* asks for 256 x 192"),
        ("first_k_dense_replace", 2, r"decoder block 0 has no mlp\.experts\.0\.down_proj"),
    ):
        text = {**config["text_config"], field: value}
        path.write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises(UserError, match=wrong):
            require_sound(tmp_path / "out")


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end_at_block: Callable[[int], None],
) -> None:
    whole = quantized(folder, tmp_path / "whole", method="gptq-qig", offload="disk")
    end_at_block(3)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder, tmp_path / "part", method="gptq-qig")
    monkeypatch.undo()
    resumed = quantized(folder, tmp_path / "part", method="gptq-qig", resume=True)
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "part")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.rare_experts() == whole.rare_experts() != ""


def test_rare_experts_are_listed(folder: Path, tmp_path: Path) -> None:
    report: QuantizationReport = quantized(folder, tmp_path / "all", method="gptq")
    tokens = report.calibration["tokens"]
    seen = report.blocks[0].experts
    assert seen is not None and sum(seen.tokens) == 2 * sum(
        tokens[kind] for kind in ("image", "text", "special")
    )
    text = report.rare_experts()
    assert " of 12 experts saw fewer than 64 calibration tokens and were calibrated on all" in text
    for name in ("report.html", "README.md", "report.json"):
        content = (tmp_path / "all" / name).read_text()
        assert (text in content) or '"rare":' in content, name
    assert "mlp.experts.*.down_proj" in (tmp_path / "all" / "report.html").read_text()
    for block in report.blocks:
        assert block.experts is not None
        block.experts.rare.clear()
    assert report.rare_experts() == ""


@pytest.mark.slow
def test_scales_are_tuned(folder: Path, tmp_path: Path) -> None:
    """Experts that no token of a step is routed to keep their scales in that step."""
    from qig_serve.demo.questions import write_jsonl

    calib = str(write_jsonl("calibration", 9, tmp_path))
    fields = {"method": "rtn", "tuning_passes": 1, "calib": calib, "samples": 9}
    report = quantized(folder, tmp_path / "out", **fields, batch_tokens=64, max_length=4096)
    assert report.tuning is not None and report.tuning.steps > 0


@pytest.mark.slow
def test_two_processes_find_the_same(folder: Path, tmp_path: Path) -> None:
    """The first group's codes, which no sum of another order has come before, to the byte."""
    from test_processes import in_two_processes

    fields = {"method": "gptq", "calib": str(folder / "calib.jsonl"), "samples": 4}
    fields |= {"device": "cpu", "grid": 3}
    one = quantized(folder, tmp_path / "one", **fields)
    (tmp_path / "two").mkdir()
    fields["allow_fallbacks"] = True
    in_two_processes(folder / "qwen3_vl_moe", tmp_path / "two", {"gptq": fields})
    two = QuantizationReport.model_validate_json(
        (tmp_path / "two" / "gptq" / "report.json").read_text()
    )
    assert two.blocks[0].experts == one.blocks[0].experts
    for a, b in zip(one.blocks, two.blocks, strict=True):
        assert b.output_error == pytest.approx(a.output_error, rel=0.2)


def test_activations_a_token(folder: Path) -> None:
    """Both streams (256 channels each), what the tower adds behind two blocks, and what is widest:
    the MLP's or an expert's inputs and outputs beside what all experts read, or what they read in
    both models while it is rounded."""
    loaded = load(folder / "qwen3_vl_moe")
    widest = {
        ("qig", "w3a16"): 256 + 96 + 256,
        ("qig", "w4a8"): 256 + 2 * 256,
        ("qig+", "w3a16"): 256 + 96 + 256,
        ("gptq", "w3a16"): 256,
        ("rtn", "w3a16"): 0,
    }
    for (method, scheme), wanted in widest.items():
        recipe = make_recipe({"calib": "demo", "method": method, "scheme": scheme})
        assert bytes_per_token(loaded, recipe) == 4 * ((2 + 2) * 256 + wanted), method


def test_what_is_not_done_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has experts, which are not written as compressed-tensors"):
        quantized(folder, tmp_path / "out", method="rtn", format="compressed-tensors")
