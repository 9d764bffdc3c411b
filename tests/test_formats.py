"""The scheme table and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest

from qig_serve.errors import UserError
from qig_serve.formats import SCHEMES, get_scheme, tensor_specs, unsupported_shape
from qig_serve.manifest import read_quantization_config

GOOD = {
    "quant_method": "qig",
    "format_version": 1,
    "scheme": "w3a16",
    "bits": 3,
    "group_size": 128,
    "ignore": ["vision_tower", "language_model.lm_head"],
}


def test_code_ranges() -> None:
    assert (SCHEMES["w3a16"].qmin, SCHEMES["w3a16"].qmax) == (0, 7)
    assert (SCHEMES["w4a8"].qmin, SCHEMES["w4a8"].qmax) == (-8, 7)
    assert SCHEMES["w3a16"].packed_factor == Fraction(32, 3)


def test_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="w3a16, w4a8"):
        get_scheme("w5a5")


def test_three_bits_per_weight_exactly() -> None:
    assert tensor_specs(SCHEMES["w3a16"], 4, 256)["weight_packed"].shape == (4, 24)


@pytest.mark.parametrize("k", [80, 200, 129])
def test_sizes_that_do_not_divide_are_refused(k: int) -> None:
    assert "that 32 divides" in str(unsupported_shape(SCHEMES["w3a16"], 4, k))
    with pytest.raises(ValueError, match="that 32 divides"):
        tensor_specs(SCHEMES["w4a8"], 4, k)


@pytest.mark.parametrize(("k", "groups"), [(32, 1), (96, 1), (160, 2), (576, 5), (960, 8)])
def test_the_last_group_may_be_shorter(k: int, groups: int) -> None:
    specs = tensor_specs(SCHEMES["w3a16"], 4, k)
    assert specs["weight_packed"].shape == (4, k * 3 // 32)
    assert specs["weight_scale"].shape == specs["weight_zero_point"].shape == (4, groups)
    assert tensor_specs(SCHEMES["w4a8"], 4, k)["weight_packed"].shape == (4, k // 8)


def test_manifest_reads_and_matches_prefixes() -> None:
    config = read_quantization_config(GOOD, "config.json")
    assert config.is_ignored("vision_tower.vision_model.encoder.layers.0.mlp.fc1")
    assert config.is_ignored("language_model.lm_head")
    assert not config.is_ignored("vision_tower_two.layer")
    assert not config.is_ignored("language_model.model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"scheme": "w9a9"}, "unknown scheme 'w9a9'"),
        ({"scheme": "w2a16", "bits": 2}, "unknown scheme"),
        ({"bits": 4}, "bits=3"),
        ({"group_size": 64}, "group_size=128"),
        ({"surprise": 1}, "surprise"),
        ({"quant_method": "awq"}, "quant_method"),
        ({"ignore": "all"}, "ignore"),
    ],
    ids=["version", "scheme", "stress-scheme", "bits", "group-size", "field", "method", "ignore"],
)
def test_manifest_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_quantization_config(GOOD | change, "config.json")


VOCABULARY = ["language_model.lm_head", "language_model.model.embed_tokens"]


def test_manifest_says_what_of_the_vocabulary_is_in_8_bits() -> None:
    """Older readers do not know the field, so that they refuse; it is absent where nothing is."""
    plain = read_quantization_config(GOOD, "config.json")
    assert plain.eight_bit == [] and "eight_bit" not in plain.to_json()
    both = read_quantization_config(
        GOOD | {"ignore": ["vision_tower"], "eight_bit": VOCABULARY}, "config.json"
    )
    assert (both.eight_bit_head, both.eight_bit_embedding) == tuple(VOCABULARY)
    assert not both.eight_bit_is_tied and both.to_json()["eight_bit"] == VOCABULARY
    tied = read_quantization_config(
        GOOD | {"ignore": ["vision_tower"], "eight_bit": VOCABULARY[1:]}, "config.json"
    )
    assert tied.eight_bit_is_tied and tied.eight_bit_head is None
    head_alone = read_quantization_config(GOOD | {"eight_bit": VOCABULARY[1:]}, "config.json")
    assert not head_alone.eight_bit_is_tied, "the head has a tensor of its own in 16 bits"


@pytest.mark.parametrize("name", ["vision_tower", VOCABULARY[0]])
def test_manifest_refuses_other_modules_in_8_bits(name: str) -> None:
    with pytest.raises(UserError, match=f"eight_bit names '{name}'"):
        read_quantization_config(GOOD | {"eight_bit": [name]}, "config.json")


def test_an_unknown_field_asks_for_a_newer_version() -> None:
    with pytest.raises(UserError, match=r"quantization_config\.sparsity: .* upgrade qig-serve"):
        read_quantization_config(GOOD | {"sparsity": 2}, "config.json")
