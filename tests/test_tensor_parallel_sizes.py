"""The tensor-parallel sizes that fit a model, and the reasons against the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qig_serve.errors import UserError
from qig_serve.tensor_parallel import (
    SIZES,
    fitting_sizes,
    in_words,
    refused_sizes,
    sizes_for_inputs,
    why_refused,
)


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
    assert fitting_sizes(refused_sizes(config, 128)) == sizes


def test_a_tower_that_is_not_split_need_not_divide() -> None:
    config = config_of(32, 8, 4096, 14336, "llava", num_attention_heads=12)
    assert fitting_sizes(refused_sizes(config, 128, split_tower=False)) == list(SIZES)


def test_reasons_are_named() -> None:
    refused = refused_sizes(config_of(28, 4, 3584, 18944, num_heads=12), 128)
    assert refused[8] == (
        "28 query heads, 3584 inputs of o in multiples of 128, 18944 inputs of down in multiples "
        "of 128, 12 heads of the vision tower cannot be split 8 ways"
    )


def test_a_size_between_the_usual_ones() -> None:
    config = config_of(12, 6, 1536, 3 * 1024)
    assert why_refused(config, 128, 3) is None
    assert why_refused(config, 128, 5).startswith("12 query heads, 6 key/value heads, ")


def test_words_for_people() -> None:
    assert in_words([1, 2], {"4": "why"}) == "1, 2; not 4 (why)"
    assert in_words([1, 2], {"16": "that", "8": "this"}) == "1, 2; not 8, 16 (this)"
    assert in_words([], {}) == "none"


def test_sizes_for_one_linear() -> None:
    assert sizes_for_inputs(29568, 128) == [1]
    assert sizes_for_inputs(512, 128) == [1, 2, 4]


def test_whole_experts_are_shared_out_where_they_cannot_be_split() -> None:
    config = config_of(32, 4, 2048, 6144, num_heads=16)  # Qwen3-VL-30B-A3B
    config.get_text_config().moe_intermediate_size = 768
    assert fitting_sizes(refused_sizes(config, 128)) == [1, 2]
    assert fitting_sizes(refused_sizes(config, 128, split_experts=False)) == [1, 2, 4, 8, 16]


def test_an_mlp_beside_experts_is_split_too() -> None:
    config = config_of(16, 8, 2816, 2112)  # Gemma 4 26B-A4B
    text = config.get_text_config()
    text.head_dim, text.moe_intermediate_size, text.enable_moe_block = 256, 704, True
    assert fitting_sizes(refused_sizes(config, 32)) == [1, 2]
    whole = why_refused(config, 128, 2, split_experts=False)
    assert whole == "2112 inputs of down in multiples of 128 cannot be split 2 ways"
    text.enable_moe_block = False
    assert "expert" not in str(why_refused(config, 128, 2))


def test_no_heads_at_all() -> None:
    text = SimpleNamespace(num_attention_heads=0, hidden_size=256, intermediate_size=512)
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    with pytest.raises(UserError, match=r"config\.json: num_attention_heads is 0: give the one"):
        why_refused(config, 128, 1)
