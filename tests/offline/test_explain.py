"""`qig-serve attribute` from end to end, on a model whose important region is known.

The model is planted: bright patches light up a channel whose weights are large, so that rounding
damages what the bright cell says far more than anything else.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from PIL import Image

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline import explain
from qig_serve.offline.explain import explain_sample
from qig_serve.offline.report.token_map import heat_map

GREY, CHANNEL = (128, 128, 128), 5


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qig_serve.demo import model as demo
    from qig_serve.demo import questions

    spec = dataclasses.replace(demo.get_spec("llava"), layers=2, vision_layers=1)
    corpus = [f"{s.question} {s.answer}" for s in questions.samples("train", 50)]
    tokenizer = demo.train_tokenizer(corpus, spec.vocab_size)
    processor = demo.make_processor(spec, tokenizer)
    model = demo.make_model(spec, tokenizer).eval()
    projector, text = model.model.multi_modal_projector, model.model.language_model
    with torch.no_grad():
        pixels = [
            processor.image_processor(Image.new("RGB", (144, 144), c), return_tensors="pt")
            for c in (GREY, (255, 255, 255))
        ]
        grey, bright = (
            model.model.vision_tower(p["pixel_values"]).last_hidden_state[0, 1:].mean(0)
            for p in pixels
        )
        way = (bright - grey) / (bright - grey).norm()
        middle = float(way @ (bright + grey)) / 2
        gain = 20 / float(way @ (bright - grey))
        projector.linear_1.weight[0] = gain * way
        projector.linear_1.bias[0] = -gain * middle  # -10 where grey, 10 where bright
        projector.linear_2.weight[:128] = 0
        projector.linear_2.weight[:, 0] = 0
        projector.linear_2.weight[CHANNEL, 0] = 1
        text.embed_tokens.weight[:, :128] = 0
        for layer in text.layers:
            layer.self_attn.o_proj.weight.zero_()  # or attention would carry the damage elsewhere
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, :128] *= 20
    folder = tmp_path_factory.mktemp("planted")
    demo.save_model(model, processor, folder)
    return folder


def _picture(path: Path, row: int, column: int) -> Path:
    image = Image.new("RGB", (144, 144), GREY)
    image.paste((255, 255, 255), (24 * column, 24 * row, 24 * column + 24, 24 * row + 24))
    image.save(path)
    return path


def _layers(*wanted: int) -> Callable[[int], list[int]]:
    return lambda _count: list(wanted)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize(("row", "column"), [(1, 4), (5, 0)])
def test_the_weight_lies_where_the_picture_matters(
    planted: Path, tmp_path: Path, scheme: str, row: int, column: int
) -> None:
    path = _picture(tmp_path / "p.png", row, column)
    picture, errors = explain_sample(planted, [path], "What color?", "white", _layers(0), scheme)
    heat = heat_map(picture.weights["layer 0"], picture.boxes, 0, (6, 6))
    assert np.unravel_index(heat.argmax(), heat.shape) == (row, column)
    # Clipping to the quartile fences leaves an outlier little above the rest, but above.
    assert (heat == heat.max()).sum() == 1
    assert float(picture.weights["layer 0"].sum()) == pytest.approx(1, abs=1e-4)
    answer = [w for w, _, counts, of_answer in picture.words("layer 0") if of_answer and counts]
    assert "".join(answer).strip() == "white"
    if scheme == "w3a16":  # with int8 activations the gradient is straight-through: approximate
        assert max(errors.values()) < 0.02


def test_command_writes_page_and_png(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _picture(tmp_path / "p.png", 2, 2)
    base = ["attribute", str(planted), "--image", str(path), "--prompt", "What <color>?"]
    assert main([*base, "-o", str(tmp_path / "o.html"), "--layers", "0,-1"]) == 0
    page = (tmp_path / "o.html").read_text()
    assert f"<h1>Token weights of {planted.name} for w3a16</h1>" in page
    assert "layer 1" in page and "&lt;color&gt;" in page and "<color>" not in page
    assert "% of the weight on the image" in capsys.readouterr().err
    record = tmp_path / "o.json"
    assert main([*base, "-o", str(tmp_path / "o.png"), "--layers", "0", "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    layer = written["layers"]["layer 0"]
    assert len(written["tokens"]) == len(layer["weights"]) and sum(
        layer["weights"]
    ) == pytest.approx(1)
    on_image = [w for t, w in zip(written["tokens"], layer["weights"], strict=True) if t["box"]]
    assert len(on_image) == 36 and sum(on_image) == pytest.approx(layer["image_share"])
    capsys.readouterr()
    assert main([*base, "-o", str(tmp_path / "o.png"), "--layers", "0", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    with Image.open(tmp_path / "o.png") as image:
        assert image.width > 800
    for words, says in (
        (["-o", str(tmp_path / "o.gif")], "must end in .html or .png"),
        (["-o", str(tmp_path / "x.png"), "--layers", "2"], "layers 0 to 1, not 2"),
        (["-o", str(tmp_path / "x.png"), "--scheme", "w9"], "unknown scheme"),
    ):
        assert main([*base, *words]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_pictures_are_named_as_in_samples(
    planted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = _picture(tmp_path / "p.png", 2, 2)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    command = ["attribute", str(planted), "--prompt", "What?", "--layers", "0", "--quiet"]
    for name in (str(path), f"file://{path}", url):
        assert main([*command, "--image", name, "-o", str(tmp_path / "o.html")]) == 0
    for name, says in (
        ("https://a/p.png", "is on a network"),
        (str(tmp_path), "is no file"),
        ("x" * 5000, "does not exist"),
        ("a\0b", "does not exist"),
    ):
        assert main([*command, "--image", name, "-o", str(tmp_path / "x.html")]) == 2
        assert says in (error := capsys.readouterr().err) and len(error) < 500
    assert not (tmp_path / "x.html").exists()
    command += ["--image", str(path)]
    for name in ("full.html", "full.png"):
        (tmp_path / name).symlink_to("/dev/full")
        assert main([*command, "-o", str(tmp_path / name)]) == 2
        assert f"{name} cannot be written: No space left" in capsys.readouterr().err
    assert main([*command, "-o", str(path)]) == 2
    assert "p.png is there, and among what this command reads" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "x.html"), "--answer", "red " * 2000]) == 2
    said = capsys.readouterr().err
    assert "attribute: the prompt is " in said and "long, and the model has 1024 positions" in said
    monkeypatch.setattr(explain, "_MAX_LENGTH", 8)
    assert main([*command, "-o", str(tmp_path / "x.html")]) == 2
    assert "long, more than 8: shorten it, or shrink its images" in capsys.readouterr().err


def test_a_missing_picture_is_named(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        explain_sample(planted, [tmp_path / "none.png"], "What?", None, _layers(0))


def test_tokens_that_cannot_be_mapped_are_refused_before_the_layers(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(*args: Any) -> None:
        raise AssertionError("a layer was run")

    def refuses(*args: Any) -> None:
        raise UserError("cannot be mapped")

    monkeypatch.setattr(explain, "explain_layers", runs)
    monkeypatch.setattr("qig_serve.offline.report.pictures.token_boxes", refuses)
    with pytest.raises(UserError, match="cannot be mapped"):
        explain_sample(planted, [_picture(tmp_path / "p.png", 1, 1)], "What?", None, _layers(0))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_maps_its_tokens_to_pixels(family: str, tmp_path: Path) -> None:
    """From the processor of the family to the overlay: no picture is left out of a report."""
    model = tiny_models.tiny_model(family, tmp_path / family)
    path = tmp_path / "wide.png"
    Image.effect_noise((150, 90), 80).save(path)  # tiles, where a family has them
    picture, _ = explain_sample(model, [path], "What?", "white", _layers(0), steps=1)
    heat = heat_map(picture.weights["layer 0"], picture.boxes, 0, (90, 150))
    # All the weight of image tokens is on the picture but for those without pixels and the crop.
    assert 0.5 < heat.mean() / picture.image_share("layer 0") < 1.1
