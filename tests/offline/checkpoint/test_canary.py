"""The canary catches what the checks before it would have refused, with those switched off."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import one_sample, tiny_model
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline import pipeline
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.checkpoint import writer as writer_module
from qig_serve.offline.checkpoint.canary import RECORD_FILE, Canary, compare_with_record
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.source import loaded_model, tensors
from qig_serve.weight_files import WeightFiles

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = "language_model.model.layers.1.mlp.up_proj"
SHARD = "model-00001-of-00001.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check of the source before the work."""
    for name in ("check_full_precision", "check_number_of_blocks", "check_block"):
        monkeypatch.setattr(loaded_model, name, lambda *_: None)
    for name in ("check_other_names", "check_outside"):
        monkeypatch.setattr(loaded_model, name, lambda *_: None)
    monkeypatch.setattr(tensors.SourceCheckpoint, "check_full_precision", lambda _: None)
    index = WeightFiles([SHARD])

    def files(directory: Path) -> WeightFiles:
        shard = (directory / SHARD).is_file()
        return index if shard else WeightFiles(["model.safetensors"])

    # A checkpoint has an index; only the source is read as it should not be.
    real = tensors.weight_files
    monkeypatch.setattr(
        tensors, "weight_files", lambda d: real(d) if d.name[:1] == "." else files(d)
    )


def quantize(model: Path, scheme: str = "w4a8", form: str = "qig") -> int:
    data, out = one_sample(model.parent), model.parent / "out"
    if form == "plain":
        settings = {"calib": data, "scheme": scheme, "method": "rtn"}
        pipeline.quantize(model, out, make_recipe(settings), quiet=True, plain=True)
        return 0
    words = ["--output", str(out), "--quiet", "--method", "rtn", "--format", form]
    return main(["quantize", str(model), "--calib", data, "--scheme", scheme, *words])


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    change(found := load_file(path))
    save_file(found, path, {"format": "pt"})


def int8_codes(d: Path) -> None:
    def change(t: Tensors) -> None:
        weight = t[f"{LINEAR}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        t[f"{LINEAR}.weight"] = (weight / scale).round().to(torch.int8)
        t[f"{LINEAR}.weight_scale"] = scale

    edit(d, change)


def float8_tower(d: Path) -> None:
    name = "multi_modal_projector.linear_1.weight"
    edit(d, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))


def scale_beside(d: Path) -> None:
    edit(d, lambda t: t.update({f"{LINEAR}.weight_scale": torch.ones(1)}))


def unknown_bias(d: Path) -> None:
    edit(d, lambda t: t.update({f"{LINEAR}.bias": torch.ones(256)}))


def unknown_in_the_tower(d: Path) -> None:
    edit(d, lambda t: t.update({"vision_tower.vision_model.extra.bias": torch.ones(2)}))


def surplus_block(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (d / "config.json").write_text(json.dumps(config))


def two_sets(d: Path) -> None:
    shutil.copy(d / "model.safetensors", d / SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(d / SHARD), SHARD)}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(d, lambda t: [v.mul_(1.5) for v in t.values()])  # what transformers reads


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (int8_codes, r"up_proj\.weight of the source is I8, and was taken for a weight"),
        (float8_tower, r"linear_1\.weight is F8_E4M3"),
        (scale_beside, r"up_proj\.weight_scale in .* config\.json does not know"),
        (unknown_bias, r"up_proj\.bias in .* is a bias that config\.json does not know"),
        (unknown_in_the_tower, r"extra\.bias .* config\.json does not know"),
        (surplus_block, r"2 decoder blocks in its files .* config\.json is 1"),
        (two_sets, "its last hidden states differ by"),
    ],
)
def test_faults_of_the_source(
    model: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    assert quantize(model) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not published" in line and re.search(message, line)
    assert not [p for p in model.parent.iterdir() if "out" in p.name]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("scheme", "form", "most"),
    [
        ("w4a8", "qig", 0.0),
        ("w3a16", "qig", 0.0),
        ("w4a8", "compressed-tensors", 0.0),
        ("w3a16", "compressed-tensors", 0.0),
        ("w3a16", "plain", 0.01),
        ("w2a16", "plain", 0.01),
    ],
)
def test_an_intact_model_passes_bit_by_bit(
    model: Path, scheme: str, form: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    check = Canary.check
    monkeypatch.setattr(Canary, "check", lambda c, d, form: seen.append(check(c, d, form)))
    assert quantize(model, scheme, form) == 0 and len(seen) == 1 and seen[0] <= most
    assert (model.parent / "out" / "canary.json").is_file() == (form == "qig")


def wrong_scale(t: Tensors) -> None:
    t[f"{LINEAR}.weight_scale"] *= 1.5


def wrong_codes(t: Tensors) -> None:
    t[f"{LINEAR}.weight_packed"].zero_()


def lost_tensor(t: Tensors) -> None:
    del t[f"{LINEAR}.weight_scale"]


def further_tensor(t: Tensors) -> None:
    t[f"{LINEAR}.bias"] = torch.zeros(4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_scale, "its last hidden states differ by"),
        (wrong_codes, "its last hidden states differ by"),
        (lost_tensor, "has no tensor .*weight_scale"),
        (further_tensor, r"up_proj\.bias in .* does not know"),
    ],
)
def test_faults_of_the_writing(
    model: Path,
    spoil: Callable[[Tensors], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = writer_module.save_shard

    def spoiled(ready: Tensors, path: Path) -> Any:
        if any(name.startswith(LINEAR) for name in ready):
            spoil(ready)
        return save(ready, path)

    monkeypatch.setattr(writer_module, "save_shard", spoiled)
    assert quantize(model) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not published" in line and re.search(message, line)
    assert not [p for p in model.parent.iterdir() if "out" in p.name]


def wrong_words(t: Tensors) -> None:
    t[f"{LINEAR}.weight_packed"].bitwise_xor_(0x11111111)


def wrong_zero(t: Tensors) -> None:
    t[f"{LINEAR}.weight_zero_point"].zero_()


def wrong_weight(t: Tensors) -> None:
    t[f"{LINEAR}.weight"] *= 1.5


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("compressed-tensors", wrong_scale, "its last hidden states differ by"),
        ("compressed-tensors", wrong_words, "its last hidden states differ by"),
        ("compressed-tensors", wrong_zero, "its last hidden states differ by"),
        ("compressed-tensors", lost_tensor, "has no tensor .*weight_scale"),
        ("compressed-tensors", further_tensor, r"up_proj\.bias in .* does not know"),
        ("plain", wrong_weight, "its last hidden states differ by"),
        ("plain", further_tensor, r"up_proj\.bias in .* does not know"),
    ],
)
def test_faults_of_the_conversion(
    model: Path,
    form: str,
    spoil: Callable[[Tensors], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = writer_module.save_shard

    def spoiled(ready: Tensors, path: Path) -> Any:
        if path.name.startswith("converted-") and any(name.startswith(LINEAR) for name in ready):
            spoil(ready)
        return save(ready, path)

    monkeypatch.setattr(writer_module, "save_shard", spoiled)
    settings = {"calib": one_sample(model.parent), "scheme": "w3a16", "method": "rtn"}
    recipe = make_recipe(settings | ({} if form == "plain" else {"format": form}))
    with pytest.raises(UserError, match=f"not published.*{message}"):
        pipeline.quantize(model, model.parent / "out", recipe, quiet=True, plain=form == "plain")
    assert not [p for p in model.parent.iterdir() if "out" in p.name]


def test_other_words_in_config_json_are_seen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM would take for a model without quantized linears, or of other numbers."""
    real = compressed_tensors.quantization_config
    settings = {"calib": one_sample(model.parent), "scheme": "w4a8", "method": "rtn"}
    recipe = make_recipe(settings | {"format": "compressed-tensors"})
    changes: list[tuple[Callable[[Any], object], str]] = [
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:x"]), "no target"),
        (lambda c: c["ignore"].append("re:.*up_proj$"), "leaves model.* out"),
        (lambda c: c["config_groups"]["group_0"].update(input_activations=None), "differ by"),
    ]
    for change, message in changes:

        def changed(*args: Any, change: Callable[[Any], object] = change) -> dict[str, Any]:
            change(config := real(*args))
            return config

        monkeypatch.setattr(compressed_tensors, "quantization_config", changed)
        with pytest.raises(UserError, match=f"not published.*{message}"):
            pipeline.quantize(model, model.parent / "out", recipe, quiet=True)


def test_it_is_part_of_the_pipeline() -> None:
    assert pipeline.Canary is Canary


@pytest.mark.parametrize(("family", "picture"), [("gemma3", [56, 56]), ("qwen2_vl", [224, 224])])
def test_a_model_that_resizes_no_picture_has_its_record_too(
    family: str, picture: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Towers take a size of their own, or what their patches divide, and calibration gave that."""
    model = tiny_model(family, tmp_path / family)
    for path in model.glob("*processor_config.json"):
        settings = json.loads(path.read_text())
        settings.get("image_processor", settings)["do_resize"] = False
        path.write_text(json.dumps(settings))
    assert quantize(model) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert json.loads((out / RECORD_FILE).read_text())["picture"] == picture
    assert compare_with_record(out) == pytest.approx(0, abs=1e-5)
    for wrong in ([56], [56, 0], [56, 1 << 20], "56"):
        change = json.loads((out / RECORD_FILE).read_text()) | {"picture": wrong}
        (out / RECORD_FILE).write_text(json.dumps(change))
        with pytest.raises(UserError, match="is damaged"):
            compare_with_record(out)


def test_a_model_without_a_record_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qig_serve.offline.checkpoint.canary._sample_of", lambda *_: [])
    assert quantize(model) == 0
    out = model.parent / "out"
    assert not (out / RECORD_FILE).exists()
    assert "There is no canary.json" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert "- There is no canary.json" in card and "qig-serve doctor llava" not in card
