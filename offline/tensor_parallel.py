"""Over how many devices a quantized model can be split, and what keeps it from others.

vLLM shares out query heads and the vision tower's heads, shares out or repeats key/value heads,
and cuts the inputs of o and down, where a part must hold whole groups of scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIZES = (1, 2, 4, 8, 16)


def refused_sizes(config: Any, k_multiple: int) -> dict[int, str]:
    """Those of SIZES that do not fit a model with this Hugging Face configuration -> why.

    Inputs must come in multiples of `k_multiple` (a group).
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    tower = _vision_heads(config)
    refused = {}
    for size in SIZES:
        reasons = []
        if heads % size:
            reasons.append(f"{heads} query heads")
        if kv_heads % size and size % kv_heads:
            reasons.append(f"{kv_heads} key/value heads")
        for name, k in (("o", heads * head_dim), ("down", int(text.intermediate_size))):
            if k % (size * k_multiple):
                reasons.append(f"{k} inputs of {name} in groups of {k_multiple}")
        if tower % size:
            reasons.append(f"{tower} heads of the vision tower")
        if reasons:
            refused[size] = ", ".join(reasons) + f" cannot be split {size} ways"
    return refused


def told_sizes(sizes: Sequence[int], refused: Mapping[str, str]) -> str:
    """For people: "1, 2, 4; not 8 (28 query heads cannot be split 8 ways)"."""
    text = ", ".join(map(str, sizes))
    return text + "".join(f"; not {size} ({why})" for size, why in refused.items())


def _vision_heads(config: Any) -> int:
    """0 where vLLM does not split the tower, or keeps it whole if it must (InternVL)."""
    vision = getattr(config, "vision_config", None)
    if vision is None or "intern" in config.model_type:
        return 0
    heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None)
    return int(heads or 0)
