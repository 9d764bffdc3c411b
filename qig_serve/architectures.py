"""The model families: one row of data each. Add a family here, and nowhere else.

Paths are those of the Hugging Face model; prefixes are those of the tensors in published files,
which may be older than the module names of the installed transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qig_serve.errors import UserError


@dataclass(frozen=True)
class SmoothingGroup:
    """A previous op, the linears that read its output, and where their damage is measured."""

    name: str
    """For reports: qkv, o, gate_up, down."""
    previous: str
    """Path, inside a block, of the norm or linear into which scales are folded."""
    linears: tuple[str, ...]
    """Paths of the linears."""
    loss_module: str
    """Path of the module whose output is compared; a linear's own path for that linear."""
    kind: Literal["norm", "linear"]
    """linear: scales divide output rows; a value projection's are shared by the query heads."""
    norm_offset: float = 0.0
    """1 for norms that multiply by (1 + weight)."""


_TOWERS = ("vision_tower.", "model.vision_tower.")
_LEVEL = "vision_model."

PictureLayout = Literal["grid", "anyres", "merged", "tiles", "split", "pooled"]


@dataclass(frozen=True)
class Architecture:
    """One family."""

    name: str
    """`model_type` of config.json."""
    decoder: str
    """Path of the module that holds the decoder's `layers`."""
    source_prefixes: tuple[str, ...]
    """What may stand before `0.self_attn...` in the files; the first that is there counts."""
    groups: tuple[SmoothingGroup, ...]
    vllm_class: str
    """What vLLM serves it with."""
    pictures: PictureLayout
    """How the image tokens lie on a picture: a function of offline/report/token_map.py."""
    note: str = ""
    text_types: tuple[str, ...] = ()
    """`model_type` of the decoders with these groups; empty where a family has one of its own."""
    splits_tower: bool = True
    """False where vLLM keeps the vision tower whole if its heads do not divide."""
    levelled_towers: tuple[str, ...] = ()
    """`model_type` of vision towers whose tensors vLLM wants as `vision_tower.vision_model.*`.

    transformers 5 leaves that level out where it saves a model under its modules' names.
    """

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths, inside a block, of all linears that are quantized, in the order of execution."""
        return tuple(name for group in self.groups for name in group.linears)

    def served_name(self, name: str, tower_type: str | None) -> str:
        """The name by which vLLM loads a tensor of the source; its own nearly always."""
        if tower_type in self.levelled_towers:
            for tower in _TOWERS:
                if name.startswith(tower) and not name.startswith(tower + _LEVEL):
                    return tower + _LEVEL + name.removeprefix(tower)
        return name


def _groups(mlp_norm: str, norm_offset: float = 0.0) -> tuple[SmoothingGroup, ...]:
    """A pre-norm block with gated MLP, as all families here have it."""
    q, k, v = (f"self_attn.{x}_proj" for x in "qkv")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    return (
        SmoothingGroup("qkv", "input_layernorm", (q, k, v), "self_attn", "norm", norm_offset),
        SmoothingGroup("o", v, ("self_attn.o_proj",), "self_attn.o_proj", "linear"),
        SmoothingGroup("gate_up", mlp_norm, gate_up, "mlp", "norm", norm_offset),
        SmoothingGroup("down", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "linear"),
    )


_PRE_NORM = _groups("post_attention_layernorm")
_LLAVA_PREFIXES = ("language_model.model.layers.", "model.language_model.layers.")
_LEVELLED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_QWEN_PREFIXES = ("model.layers.", "model.language_model.layers.")

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "llava",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "LlavaForConditionalGeneration",
            "grid",
            text_types=_PLAIN_DECODERS,
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "llava_onevision",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "LlavaOnevisionForConditionalGeneration",
            "anyres",
            "tiles, and a newline token after each row",
            _PLAIN_DECODERS,
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "qwen2_vl",
            "model.language_model",
            _QWEN_PREFIXES,
            _PRE_NORM,
            "Qwen2VLForConditionalGeneration",
            "merged",
            "M-RoPE",
        ),
        Architecture(
            "qwen2_5_vl",
            "model.language_model",
            _QWEN_PREFIXES,
            _PRE_NORM,
            "Qwen2_5_VLForConditionalGeneration",
            "merged",
            "M-RoPE",
        ),
        Architecture(
            "qwen3_vl",
            "model.language_model",
            ("model.language_model.layers.",),
            _PRE_NORM,
            "Qwen3VLForConditionalGeneration",
            "merged",
            "M-RoPE, q and k norms, vision features added after early blocks",
        ),
        Architecture(
            "internvl",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "InternVLForConditionalGeneration",
            "tiles",
            "the Hugging Face port of InternVL 2.5, 3 and 3.5",
            _PLAIN_DECODERS,
            splits_tower=False,
        ),
        Architecture(
            "gemma3",
            "model.language_model",
            _LLAVA_PREFIXES,
            _groups("pre_feedforward_layernorm", norm_offset=1.0),
            "Gemma3ForConditionalGeneration",
            "pooled",
            "(1 + w) norms, norms after attention and MLP, sliding windows",
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "idefics3",
            "model.text_model",
            ("model.text_model.layers.",),
            _PRE_NORM,
            "Idefics3ForConditionalGeneration",
            "split",
            text_types=_PLAIN_DECODERS,
        ),
        Architecture(
            "smolvlm",
            "model.text_model",
            ("model.text_model.layers.",),
            _PRE_NORM,
            "SmolVLMForConditionalGeneration",
            "split",
            text_types=_PLAIN_DECODERS,
        ),
    )
}


def get_architecture(model_type: str) -> Architecture:
    """The row of a `model_type`; UserError with the known ones otherwise."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise UserError(
            f"models of type {model_type!r} are not supported; known types: "
            + ", ".join(sorted(ARCHITECTURES))
        ) from None
