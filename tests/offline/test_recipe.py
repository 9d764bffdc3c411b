"""Recipes: one set of fields for YAML, command line and Python; methods are defaults of it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import yaml

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline.importance.weights import SOURCES
from qig_serve.offline.placement import pick_device
from qig_serve.offline.recipe import (
    METHODS,
    PRESETS,
    ROUNDINGS,
    Damping,
    QuantRecipe,
    TokenWeightSource,
    load_recipe,
    make_recipe,
)


def test_methods_differ_in_their_fields() -> None:
    awq, qig = QuantRecipe(method="awq"), QuantRecipe(method="qig")
    different = {f for f in QuantRecipe.model_fields if getattr(awq, f) != getattr(qig, f)}
    assert different == {"method", "token_weights"}
    assert QuantRecipe(method="mbq").token_weights == "modality"
    assert QuantRecipe(method="rtn").equalize == "none"
    assert not QuantRecipe(method="rtn").rounding_method.statistics
    assert QuantRecipe(method="gptq").rounding_method.statistics
    assert QuantRecipe(method="gptq-qig").rounding_method.weighted


def test_explicit_fields_win_over_the_method() -> None:
    recipe = QuantRecipe(method="qig", token_weights="uniform", iqr=False, grid=5)
    assert (recipe.token_weights, recipe.iqr, recipe.grid) == ("uniform", False, 5)


def test_damping_is_the_rounding_methods() -> None:
    """In the compensation and in the noise model of equalization, which reckons with it."""
    recipe = QuantRecipe()
    assert recipe.rounding_method.damping == recipe.equalization.compensation
    assert recipe.rounding_method.damping == Damping(validated=True)
    assert QuantRecipe(method="gptq").rounding_method.damping == Damping(by="mean")
    assert QuantRecipe(method="qig").equalization.compensation is None


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_rounding_method_is_a_file_and_a_row(name: str) -> None:
    module = import_module(f"qig_serve.offline.rounding.{ROUNDINGS[name].module}")
    assert callable(module.round_weight) and QuantRecipe(rounding=name).rounding == name


def test_every_source_of_token_weights_has_a_function() -> None:
    assert set(get_args(TokenWeightSource)) == set(SOURCES)


def test_rounding_is_the_methods_unless_set() -> None:
    assert QuantRecipe(scheme="w4a8").rounding == "qronos-outputs"
    assert QuantRecipe(scheme="w3a16", rounding="qronos").rounding == "qronos"
    assert QuantRecipe(scheme="w3a16", method="gptq").rounding == "gptq"


def test_baseline_follows_the_scheme() -> None:
    assert QuantRecipe(scheme="w3a16").baseline == "zero"
    assert QuantRecipe(scheme="w4a8").baseline == "quantized"
    assert QuantRecipe(scheme="w4a8", baseline="zero").baseline == "zero"
    with pytest.raises(UserError, match="quantized activations"):
        make_recipe({"scheme": "w3a16", "baseline": "quantized"})


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip(method: str, tmp_path: Path) -> None:
    recipe = QuantRecipe(scheme="w4a8", method=method, calib="x.jsonl", seed=3)
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert make_recipe(load_recipe(str(path))) == recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    recipe = make_recipe(load_recipe(preset))
    assert recipe.scheme in preset
    if preset.startswith("paper"):
        assert (recipe.steps, recipe.quadrature, recipe.grid) == (32, "uniform", 20)
        assert recipe.iqr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "w5a5"}, "unknown scheme 'w5a5': choose one of w3a16, w4a8"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"samples": 0}, "samples"),
        ({"method": "magic"}, "method"),
        ({"seed": 2**63}, "seed: Input should be less than"),
    ],
    ids=["scheme", "field", "samples", "method", "long-seed"],
)
def test_wrong_values_name_the_field(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(values)


def test_a_recipe_that_is_no_file() -> None:
    with pytest.raises(UserError, match="paper-w3a16"):
        load_recipe("paper-w9")


def test_command_line_is_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("scheme: w4a8\nmethod: awq\nsamples: 16\n")
    words = ["quantize", "m", "--recipe", str(path), "--samples", "8", "--no-iqr"]
    assert main([*words, "--equalize", "none", "--print-recipe"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert set(printed) == set(QuantRecipe.model_fields)
    assert (printed["scheme"], printed["method"], printed["samples"]) == ("w4a8", "awq", 8)
    assert (printed["iqr"], printed["equalize"]) == (False, "none")
    assert printed["baseline"] == "quantized"


def test_unknown_scheme_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "m", "--scheme", "w5", "--output", "nowhere"]) == 2
    assert "unknown scheme 'w5'" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("scheme: w3a16\nsamples: 4\nscheme: w4a8\n")
    with pytest.raises(UserError, match="'scheme' stands twice"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"device {name}: "):
        pick_device(name)
