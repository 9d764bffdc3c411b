"""Bundled models with and without channel outliers, and starting one from another's decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from qig_serve.cli import main
from qig_serve.demo import MODEL_DIR, bundled
from qig_serve.demo.batches import Encoder, answer_logits, make_batch
from qig_serve.demo.bundled import bundled_directory, export_bundled
from qig_serve.demo.measure import answers_right, rounded_to_nearest
from qig_serve.demo.model import MODELS, get_spec, load_model, make_model, train_tokenizer
from qig_serve.demo.outliers import Outliers, add_outliers, decoder_layers
from qig_serve.demo.questions import samples
from qig_serve.demo.warm_start import THE_BUNDLED, start_from, strongest_neurons
from qig_serve.errors import UserError
from qig_serve.formats import get_scheme

TRAINED = [name for name, spec in MODELS.items() if spec.trained]


def test_export_without_outliers_computes_the_same(tmp_path: Path) -> None:
    copied = export_bundled("llava", tmp_path / "copied")
    assert (copied / "model.safetensors").read_bytes() == (
        MODEL_DIR / "model.safetensors"
    ).read_bytes()
    plain = export_bundled("llava", tmp_path / "plain", outliers=False)
    sample = next(iter(samples("dev", 1)))
    logits = []
    for directory in (copied, plain):
        model, processor = load_model(directory)
        encoder = Encoder(processor.tokenizer)
        question = [[(sample.type, sample.question, sample.answer)]]
        batch = make_batch(encoder, [np.asarray(sample.image)], question, torch.bfloat16)
        with torch.no_grad():
            logits.append(answer_logits(model, batch, encoder.before_image)[0])
        largest = decoder_layers(model)[0].input_layernorm.weight.abs().max()
        assert (largest > 4) == (directory == copied)
    assert torch.equal(*logits)


def test_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the models are llava, "):
        bundled_directory("clip")
    with pytest.raises(UserError, match="no trained 'qwen3-vl-moe' .* demo train --model qwen3-vl"):
        bundled_directory("qwen3-vl-moe")
    with pytest.raises(UserError, match="exists already"):
        export_bundled("llava", tmp_path)


def test_start_from_the_bundled_decoder() -> None:
    """Twice as deep, the decoder is the source's with identities in between."""
    source, processor = load_model(MODEL_DIR, torch.float32)
    tokenizer = processor.tokenizer
    spec = dataclasses.replace(get_spec("llava"), layers=8)
    model = make_model(spec, tokenizer).eval()
    start_from(model, tokenizer, THE_BUNDLED, spec.sink_channel)
    ids = torch.tensor([tokenizer("How many red stars are there?")["input_ids"]])
    with torch.no_grad():
        ours = model(input_ids=ids).logits[..., : len(tokenizer)]
        theirs = source(input_ids=ids).logits[..., : len(tokenizer)]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_experts_start_from_the_neurons_of_an_mlp() -> None:
    """As strong together as the whole; and channel outliers leave what they compute as it is."""
    spec = dataclasses.replace(get_spec("qwen3-vl-moe"), vision_layers=1)
    tokenizer = train_tokenizer(["How many red stars are there?"], 768, spec.family)
    model = make_model(spec, tokenizer).eval()
    start_from(model, tokenizer, THE_BUNDLED, spec.sink_channel)
    full, _ = load_model(MODEL_DIR, torch.float32)
    add_outliers(full, Outliers().undo(), keep=(spec.sink_channel,))
    source = decoder_layers(full)[0].mlp
    experts = decoder_layers(model)[0].mlp.experts
    for matrix in experts.down_proj:
        columns = 2 * source.down_proj.weight  # half of the neurons, twice as strong
        assert (matrix.T[:, None] == columns.T).all(-1).any(-1).sum() == spec.intermediate
    ids = torch.tensor([tokenizer("How many red stars are there?")["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        add_outliers(model, Outliers(), keep=(spec.sink_channel,))
        assert torch.equal(model(input_ids=ids).logits, before)
    router = decoder_layers(model)[0].mlp.gate.weight.detach()
    assert float(router.abs().amax(0).max() / router.abs().amax(0).min()) > 8


def test_the_same_family_keeps_its_tower() -> None:
    source, processor = load_model(MODEL_DIR, torch.float32)
    spec = dataclasses.replace(get_spec("llava"), vision_layers=2)
    model = make_model(spec, processor.tokenizer)
    start_from(model, processor.tokenizer, MODEL_DIR, spec.sink_channel)
    theirs = dict(source.named_parameters())
    tower = [n for n, _ in model.named_parameters() if "vision_tower" in n]
    own = dict(model.named_parameters())
    assert tower and all(torch.equal(own[n], theirs[n]) for n in tower)


def test_strongest_neurons_are_kept_in_order() -> None:
    mlp = decoder_layers(load_model(MODEL_DIR)[0])[0].mlp
    kept = strongest_neurons(mlp, 100)
    assert len(kept) == 100 and bool((kept.diff() > 0).all())
    with pytest.raises(ValueError, match="768 neurons, 800"):
        strongest_neurons(mlp, 800)


def test_a_model_of_the_tests_is_not_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = ["demo", "export", "--model", "internvl", "--output", str(tmp_path / "out")]
    assert main(exported) == 0 and (tmp_path / "out" / "config.json").is_file()
    capsys.readouterr()
    monkeypatch.setattr(bundled, "TEST_MODELS", tmp_path / "site-packages" / "tests" / "models")
    assert main([*exported[:-1], str(tmp_path / "other")]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert "'internvl' is not part of the installed package: use 'llava', or run" in sentence
    assert not (tmp_path / "other").exists()


def test_the_package_contains_one_model() -> None:
    weights = Path(bundled.__file__).parents[1].rglob("*.safetensors")
    assert list(weights) == [MODEL_DIR / "model.safetensors"]


def test_all_models_together_are_small() -> None:
    files = [p for name in TRAINED for p in bundled_directory(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 32_000_000


@pytest.mark.parametrize("name", [n for n in TRAINED if n != "llava"])
def test_other_models_answer_and_feel_three_bits(name: str) -> None:
    """test_bundled.py does so for llava, at length."""
    model, processor = load_model(bundled_directory(name))
    asked = list(samples("dev", 160))
    encoder = Encoder(processor.tokenizer, get_spec(name).family)
    right = sum(answers_right(model, encoder, asked)) / len(asked)
    rounded = rounded_to_nearest(model, get_scheme("w3a16"))
    after = sum(answers_right(rounded, encoder, asked)) / len(asked)
    assert right > 0.75 and after < right - 0.03
