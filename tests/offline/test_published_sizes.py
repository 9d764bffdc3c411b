"""Configurations of published sizes, no weights: shapes, memory per token, tensor parallelism.

Decoders as their config.json has them; towers by the heads that tensor parallelism shares out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qig_serve.architectures import get_architecture
from qig_serve.experts import count_field, unfuse
from qig_serve.formats import SCHEMES, tensor_specs
from qig_serve.offline.estimate import bytes_per_token
from qig_serve.offline.pipeline import check_shapes
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.source import mlp_width
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.tensor_parallel import fitting_sizes, refused_sizes

SERVABLE = [scheme for scheme in SCHEMES.values() if scheme.servable]


@dataclass(frozen=True)
class Size:
    """A published model."""

    family: str
    hidden: int
    blocks: int
    mlp: int
    heads: int
    kv_heads: int
    billions: float
    """Weights of the decoder's linears."""
    parallel: tuple[int, ...]
    """Tensor-parallel sizes that fit, where inputs are cut at groups of 128 (w3a16)."""
    head_dim: int | None = None
    decoder: str = ""
    """`model_type` of the decoder, where the family has several."""
    tower_heads: int = 16
    more: tuple[tuple[str, Any], ...] = ()
    padded: int | None = None
    """Channels that the MLP is stored with by default; `parallel` is then of these."""


def qwen3_5(*sizes: Any, values: int) -> Size:
    return Size("qwen3_5", *sizes, 256, more=(("linear_num_value_heads", values),))


def experts(count: int, width: int, top: int = 8, **more: Any) -> tuple[tuple[str, Any], ...]:
    found = {"num_experts": count, "moe_intermediate_size": width, "num_experts_per_tok": top}
    return tuple({**found, **more}.items())


def qwen2(family: str, *sizes: Any) -> Size:
    return Size(family, *sizes, decoder="qwen2")


GEMMA4 = (
    ("global_head_dim", 512),
    ("num_global_key_value_heads", 4),
    ("attention_k_eq_v", True),
    ("hidden_size_per_layer_input", 0),
)
GEMMA4_MOE = dict(GEMMA4) | {
    "num_global_key_value_heads": 2,
    "intermediate_size": 2112,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}


def shared(blocks: int, period: int, wide: bool) -> tuple[tuple[str, Any], ...]:
    """Gemma 4's small models: so many blocks read the keys of earlier ones."""
    return (
        ("global_head_dim", 512),
        ("num_kv_shared_layers", blocks),
        ("use_double_wide_mlp", wide),
        ("hidden_size_per_layer_input", 256),
        ("layer_types", (*["sliding_attention"] * (period - 1), "full_attention")),
    )


PUBLISHED = {
    "Qwen3.5-4B": qwen3_5(2560, 32, 9216, 16, 4, 3.57, (1, 2, 4, 8), values=32),
    "Qwen3.5-9B": qwen3_5(4096, 32, 12288, 16, 4, 6.9, (1, 2, 4, 8, 16), values=32),
    "Qwen3.5-27B": qwen3_5(5120, 64, 17408, 24, 4, 24.3, (1, 2, 4, 8), values=48),
    "Qwen3-VL-2B": Size("qwen3_vl", 2048, 28, 6144, 16, 8, 1.4, (1, 2, 4, 8, 16), 128),
    "Qwen3-VL-4B": Size("qwen3_vl", 2560, 36, 9728, 32, 8, 3.6, (1, 2, 4), 128),
    "Qwen3-VL-8B": Size("qwen3_vl", 4096, 36, 12288, 32, 8, 6.9, (1, 2, 4, 8, 16), 128),
    "Qwen3-VL-32B": Size("qwen3_vl", 5120, 64, 25600, 64, 8, 31.2, (1, 2, 4, 8), 128),
    "Qwen3-VL-30B-A3B": Size(
        "qwen3_vl_moe", 2048, 48, 6144, 32, 4, 29.9, (1, 2), 128, more=experts(128, 768)
    ),
    "Qwen3-VL-235B-A22B": Size(
        "qwen3_vl_moe", 4096, 94, 12288, 64, 4, 233.7, (1, 2, 4), 128, more=experts(128, 1536)
    ),
    "Qwen3.5-35B-A3B": Size(
        "qwen3_5_moe",
        2048,
        40,
        8 * 512,  # of the experts of a token
        16,
        2,
        33.4,
        (1, 2, 4),
        256,
        more=experts(256, 512, shared_expert_intermediate_size=512, linear_num_value_heads=32),
    ),
    "Qwen2.5-VL-3B": Size("qwen2_5_vl", 2048, 36, 11008, 16, 2, 2.8, (1, 2)),
    "Qwen2.5-VL-7B": Size("qwen2_5_vl", 3584, 28, 18944, 28, 4, 6.5, (1, 2, 4)),
    "Qwen2.5-VL-32B": Size("qwen2_5_vl", 5120, 64, 27648, 40, 8, 31.2, (1, 2, 4, 8)),
    "Qwen2.5-VL-72B": Size("qwen2_5_vl", 8192, 80, 29568, 64, 8, 70.2, (1, 2, 4, 8), padded=29696),
    "InternVL3-1B": qwen2("internvl", 896, 24, 4864, 14, 2, 0.36, (1,)),
    "InternVL3-2B": qwen2("internvl", 1536, 28, 8960, 12, 2, 1.3, (1, 2)),
    "InternVL3-8B": qwen2("internvl", 3584, 28, 18944, 28, 4, 6.5, (1, 2, 4)),
    "InternVL3-14B": qwen2("internvl", 5120, 48, 13824, 40, 8, 13.2, (1, 2, 4)),
    "InternVL3-38B": qwen2("internvl", 5120, 64, 27648, 40, 8, 31.2, (1, 2, 4, 8)),
    "Gemma-3-4B": Size("gemma3", 2560, 34, 10240, 8, 4, 3.2, (1, 2, 4, 8), 256),
    "Gemma-3-12B": Size("gemma3", 3840, 48, 15360, 16, 8, 10.8, (1, 2, 4, 8), 256),
    "Gemma-3-27B": Size("gemma3", 5376, 62, 21504, 32, 16, 25.6, (1, 2, 4, 8), 128),
    "Gemma-4-31B": Size("gemma4", 5376, 60, 21504, 32, 16, 29.2, (1, 2, 4, 8), 256, more=GEMMA4),
    "Gemma-4-E2B": Size(
        "gemma4", 1536, 35, 6144, 8, 1, 1.84, (1, 2, 4, 8), 256, more=shared(20, 5, wide=True)
    ),
    "Gemma-4-E4B": Size(
        "gemma4", 2560, 42, 10240, 8, 2, 3.89, (1, 2, 4, 8), 256, more=shared(18, 6, wide=False)
    ),
    "Gemma-4-26B-A4B": Size(
        "gemma4",
        2816,
        30,
        2112 + 8 * 704,  # of the MLP and the experts of a token
        16,
        8,
        24.5,
        (1,),
        256,
        more=tuple(GEMMA4_MOE.items()),
    ),
    "Mistral-Small-3.2-24B": Size(
        "mistral3", 5120, 40, 32768, 32, 8, 22.2, (1, 2, 4, 8, 16), 128, "mistral"
    ),
    "Ministral-3-8B": Size(
        "mistral3", 4096, 34, 14336, 32, 8, 7.4, (1, 2, 4, 8, 16), 128, "ministral3"
    ),
    "GLM-4.1V-9B": Size("glm4v", 4096, 40, 13696, 32, 2, 8.1, (1,), tower_heads=12),
    "GLM-4.5V": Size(
        "glm4v_moe",
        4096,
        46,
        10944,
        96,
        8,
        105.4,
        (1,),
        128,
        tower_heads=12,
        more=(
            ("n_routed_experts", 128),
            ("n_shared_experts", 1),
            ("moe_intermediate_size", 1408),
            ("num_experts_per_tok", 8),
            ("first_k_dense_replace", 1),
        ),
    ),
    "LLaVA-NeXT-7B": Size(
        "llava_next", 4096, 32, 14336, 32, 8, 7.0, (1, 2, 4, 8, 16), decoder="mistral"
    ),
    "LLaVA-OneVision-0.5B": qwen2("llava_onevision", 896, 24, 4864, 14, 2, 0.36, (1,)),
    "LLaVA-OneVision-7B": qwen2("llava_onevision", 3584, 28, 18944, 28, 4, 6.5, (1, 2, 4)),
    "SmolVLM-2B": Size("smolvlm", 2048, 24, 8192, 32, 32, 1.6, (1, 2, 4, 8, 16), 64, "llama"),
    "Idefics3-8B": Size("idefics3", 4096, 32, 14336, 32, 8, 7.0, (1, 2, 4, 8, 16), 128, "llama"),
    "SmolVLM-256M": Size("smolvlm", 576, 30, 1536, 9, 3, 0.106, (1,), 64, "llama", 12),
    "SmolVLM-500M": Size("smolvlm", 960, 32, 2560, 15, 5, 0.315, (1,), 64, "llama", 12),
}
FINER = {
    "Qwen3.5-4B": (16,),
    "Qwen3-VL-30B-A3B": (4, 8),
    "Qwen3-VL-235B-A22B": (8, 16),
    "Qwen3.5-35B-A3B": (8, 16),
    "Qwen3-VL-4B": (8, 16),
    "Qwen3-VL-32B": (16,),
    "Qwen2.5-VL-3B": (4, 8),
    "Qwen2.5-VL-72B": (16,),
    "InternVL3-1B": (2,),
    "InternVL3-2B": (4,),
    "InternVL3-14B": (8,),
    "Gemma-3-12B": (16,),
    "Gemma-3-27B": (16,),
    "Gemma-4-31B": (16,),
    "Gemma-4-26B-A4B": (2,),  # 2112 and 704 channels
    "GLM-4.1V-9B": (2, 4),
    "GLM-4.5V": (2,),  # 10944 channels before the experts
    "LLaVA-OneVision-0.5B": (2,),
}
"""The sizes that fit beside those where inputs are cut at any 32 (w4a8)."""


def config_of(size: Size) -> Any:
    from transformers import CONFIG_MAPPING

    text: dict[str, Any] = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.blocks,
        "intermediate_size": size.mlp,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        **dict(size.more),
    }
    if period := text.get("layer_types"):
        text["layer_types"] = list(period) * (size.blocks // len(period))
    if size.head_dim is not None:
        text["head_dim"] = size.head_dim
    if size.decoder:
        text["model_type"] = size.decoder
    vision = {"vision_config": {}} if size.family == "gemma4" else {}
    config = CONFIG_MAPPING[size.family](text_config=text, **vision)
    for key in ("num_attention_heads", "num_heads"):
        if hasattr(config.vision_config, key):
            setattr(config.vision_config, key, size.tower_heads)
    return config


class Shapes(dict[str, tuple[int, ...]]):
    """What a SourceCheckpoint says of its tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name]


class NoWeights:
    """What LoadedModel says of a model, from its configuration alone; blocks on the meta device."""

    def __init__(self, size: Size) -> None:
        import copy

        from transformers import AutoModelForImageTextToText

        self.config = config_of(size)
        self.arch = get_architecture(size.family)
        self.text_config = self.config.get_text_config()
        self.num_blocks = size.blocks
        self.blocks_behind = 0
        few = copy.deepcopy(self.config)
        few.get_text_config().num_hidden_layers = 1
        if field := count_field(self.text_config):
            setattr(few.get_text_config(), field, 1)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(few)
        self._block = type(model.get_submodule(self.arch.decoder).layers[0])
        self._made: dict[tuple[str, bool, bool], torch.nn.Module] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for index in range(self.num_blocks):
            for name, tensor in self.meta_block(index).state_dict().items():
                self.shapes[self.source_name(index, name)] = tuple(tensor.shape)
        self.source = Shapes(self.shapes)

    def meta_block(self, index: int) -> torch.nn.Module:
        kinds = getattr(self.text_config, "layer_types", None)
        shared = getattr(self.text_config, "num_kv_shared_layers", 0)
        dense = index < getattr(self.text_config, "first_k_dense_replace", 0)
        kind = (kinds[index] if kinds else "", index >= self.num_blocks - shared, dense)
        if kind not in self._made:
            with torch.device("meta"):
                self._made[kind] = self._block(self.text_config, layer_idx=index)
            unfuse(self._made[kind])
        return self._made[kind]

    has_experts = LoadedModel.has_experts
    eight_bit: tuple[str, ...] = ()

    def source_name(self, index: int, name: str) -> str:
        return f"{index}.{name}"

    def groups(self, block: torch.nn.Module) -> Any:
        return self.arch.groups_of(block)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_can_be_quantized_and_split(name: str) -> None:
    size = PUBLISHED[name]
    model: Any = NoWeights(size)
    linears = [
        model.shapes[model.source_name(index, f"{linear}.weight")]
        for index in range(size.blocks)
        for group in model.groups(model.meta_block(index))
        for linear in group.linears
    ]
    weights = sum(n * k for n, k in linears)
    assert weights / 1e9 == pytest.approx(size.billions, rel=0.03)
    for scheme in SERVABLE:
        check_shapes(model, scheme)
        specs = (tensor_specs(scheme, n, k).values() for n, k in set(linears))
        assert all(min(spec.shape) > 0 for one in specs for spec in one)
        padding, note = mlp_width.choose(model, scheme, None)
        assert (padding and padding.padded) == size.padded and not note
        config = padding.config(model.config) if padding else model.config
        refused = refused_sizes(config, scheme.cut_multiple)
        finer = () if scheme.group_size else FINER.get(name, ())
        assert tuple(fitting_sizes(refused)) == size.parallel + finer, refused
        recipe = make_recipe({"scheme": scheme.name, "method": "qig+", "calib": "x"})
        waiting = bytes_per_token(model, recipe)  # two streams, and a group's inputs and outputs
        for_each = getattr(model.text_config, "hidden_size_per_layer_input", 0) * size.blocks
        tower = model.config.vision_config
        for_each += len(getattr(tower, "deepstack_visual_indexes", ())) * size.hidden
        waiting -= 4 * for_each
        widest = max(k for _, k in linears)
        assert 4 * 4 * size.hidden <= waiting <= 4 * (3 * size.hidden + 2 * widest)
