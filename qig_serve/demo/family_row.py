"""What differs between families of demonstration models, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qig_serve.demo.pictures import GRID

if TYPE_CHECKING:
    from qig_serve.demo.model import ModelSpec

IMAGE_TOKENS = GRID * GRID
Positions = list[tuple[int, int, int]]  # (time, row, column) per token


@dataclass(frozen=True)
class Family:
    """One family, in plain functions."""

    special_tokens: tuple[str, ...]
    image_token: str
    image_text: str  # what the chat template writes for an image
    image_frame: tuple[str, str]  # what the processor leaves before and after the image tokens
    make_config: Callable[[ModelSpec, Any], Any]
    model_class: str  # of transformers
    make_processor: Callable[[Any, str], Any]  # (tokenizer, chat template)
    image_processor_type: str
    published: tuple[tuple[str, str], ...]  # (transformers 5 prefix, published prefix)
    image_tokens: Callable[[Any, Any], Any]  # (model, [B, 3, H, W]) -> [B, 36, hidden]
    image_positions: Callable[[int], Positions]  # first free position -> the image's
    unused: tuple[str, ...] = ()  # parameters that no output depends on
    multi_axis: bool = False  # rotary positions have three axes (M-RoPE)
    # (name, tensor in transformers 5) -> tensor in published files
    as_published: Callable[[str, Any], Any] = lambda name, tensor: tensor
    token_roles: tuple[tuple[str, str], ...] = ()  # attributes the processor asks the tokenizer for


def common_fields(tokenizer: Any) -> dict[str, Any]:
    """Fields of a configuration that a model's and its decoder's have in common."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**ids, "tie_word_embeddings": False}


def decoder_sizes(spec: ModelSpec) -> dict[str, Any]:
    """Fields of a decoder's configuration that no tokenizer knows, by their common names."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_positions,
        "bos_token_id": None,
    }


def pixel_options() -> dict[str, Any]:
    """What an image processor does beside resizing: pixels between -1 and 1, in RGB."""
    half = [0.5, 0.5, 0.5]
    flags = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    return {"image_mean": half, "image_std": half, **dict.fromkeys(flags, True)}
