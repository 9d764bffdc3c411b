"""The models of the benchmark in vLLM: configurations, processors and tokenizers at real sizes.

Qwen2-VL-7B, LLaVA-OneVision-7B and InternVL2-8B (the InternVL port of transformers), from their
published sizes; nothing is downloaded. `tiny` makes the same with few and narrow layers.

Tokenizer: a word per token and as many words as the model has embeddings, so that text made from
random tokens, as `vllm bench` makes it, has as many tokens again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import tiny_models
from helpers.tiny_models import HALF, Tiny

STD = 0.02


@dataclass(frozen=True)
class BenchModel:
    """How a model is made: its configuration, its processor, and the pictures it is shown."""

    family: str
    """Row of qig_serve/architectures.py and of the tiny models."""
    vocabulary: int
    config: Callable[[Any, bool], Any]
    """(tokenizer, tiny) -> configuration."""
    processor: Callable[[Any, str, bool], Any]
    """(tokenizer, chat template, tiny) -> processor."""
    picture: int
    """Side in pixels of the pictures shown; tiny models are shown 56."""

    @property
    def row(self) -> Tiny:
        """Special tokens, image text and published names, which are the family's."""
        return tiny_models.FAMILIES[self.family]


def text_fields(tokenizer: Any, tiny: bool, **real: Any) -> dict[str, Any]:
    sizes = tiny_models.text_fields(tokenizer)
    if tiny:
        return sizes
    return {
        **sizes, "initializer_range": STD, "vocab_size": len(tokenizer), "head_dim": 128,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, **real,
    }  # fmt: skip


_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def _qwen2_vl_config(tokenizer: Any, tiny: bool) -> Any:
    from transformers import Qwen2VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    if tiny:
        rope = tiny_models.MROPE
    text = text_fields(tokenizer, tiny, **_QWEN2_7B)
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
    if tiny:
        vision = {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(
        vision_config={**vision, "hidden_size": text["hidden_size"], "patch_size": 14},
        text_config={**text, "rope_parameters": rope},
        **tiny_models.qwen_ids(tokenizer),
        **tiny_models.common_fields(tokenizer),
    )


def _qwen2_vl_processor(tokenizer: Any, template: str, tiny: bool) -> Any:
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # At most 1,280 tokens per picture, as the model card recommends.
    size = {"shortest_edge": 56 * 56, "longest_edge": (112 * 112 if tiny else 1280 * 28 * 28)}
    options = {"size": size, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**options),
        tokenizer,
        Qwen2VLVideoProcessor(**options),
        chat_template=template,
    )


def _onevision_pinpoints(side: int, most: int) -> list[list[int]]:
    return [[side * i, side * j] for i in range(1, most + 1) for j in range(1, most + 1)]


def _onevision_config(tokenizer: Any, tiny: bool) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    vision: dict[str, Any] = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
        "num_attention_heads": 16,
    }  # fmt: skip
    side = 56 if tiny else 384
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **(tiny_models.VISION if tiny else vision),
            image_size=side,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**text_fields(tokenizer, tiny, **_QWEN2_7B)),
        image_token_index=tiny_models.token_id(tokenizer, "<image>"),
        video_token_index=tiny_models.token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_onevision_pinpoints(side, 2 if tiny else 6),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4" if tiny else "anyres_max_9",
        **tiny_models.common_fields(tokenizer),
    )


def _onevision_processor(tokenizer: Any, template: str, tiny: bool) -> Any:
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    side = 56 if tiny else 384
    square = {"height": side, "width": side}
    pinpoints = _onevision_pinpoints(side, 2 if tiny else 6)
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints, **HALF),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square, **HALF),
        num_image_tokens=(side // 14) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4" if tiny else "anyres_max_9",
        chat_template=template,
    )


def _internvl_config(tokenizer: Any, tiny: bool) -> Any:
    """InternVL2-8B: InternViT-300M and InternLM2-7B, whose blocks are Llama's."""
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

    text = text_fields(
        tokenizer, tiny, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "attention_bias": True,
    }  # fmt: skip
    side = 56 if tiny else 448
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **(tiny_models.VISION if tiny else vision), image_size=[side] * 2, patch_size=[14, 14]
        ),
        text_config=LlamaConfig(**text),
        image_token_id=tiny_models.token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4 if tiny else 256,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        **tiny_models.common_fields(tokenizer),
    )


def _internvl_processor(tokenizer: Any, template: str, tiny: bool) -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    square = dict.fromkeys(("height", "width"), 56 if tiny else 448)
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(
            size=square, crop_to_patches=True, max_patches=4 if tiny else 12, **HALF
        ),
        tokenizer,
        InternVLVideoProcessor(size=square, **HALF),
        image_seq_length=4 if tiny else 256,
        chat_template=template,
    )


MODELS: dict[str, BenchModel] = {
    "qwen2-vl-7b": BenchModel("qwen2_vl", 152064, _qwen2_vl_config, _qwen2_vl_processor, 448),
    "llava-onevision-7b": BenchModel(
        "llava_onevision", 152000, _onevision_config, _onevision_processor, 384
    ),
    "internvl2-8b": BenchModel("internvl", 92544, _internvl_config, _internvl_processor, 448),
}
"""92,553 of InternVL2 is rounded down to a multiple of 64: padding takes no part in the times."""


def make_tokenizer(model: BenchModel, tiny: bool) -> Any:
    """A word per token; the special tokens of the family and as many words as fill the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *model.row.tokens]
    words = (512 if tiny else model.vocabulary) - len(special)
    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=model.row.roles or list(model.row.tokens),
        clean_up_tokenization_spaces=False,
        chat_template=tiny_models.chat_template(model.row.image_text),
    )
    fast.add_tokens([t for t in special if t not in fast.get_vocab()], special_tokens=True)
    return fast


def shapes(model: BenchModel, config: Any) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor, without taking memory for any."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(made).__name__]
    return {
        tiny_models.published_name(model.family, name): tuple(tensor.shape)
        for name, tensor in made.state_dict().items()
    }
