"""A tiny random model of every family's real architecture, as its published checkpoints look.

    tiny_model("gemma3", directory)      config, processor, tokenizer, weights

Decoders: hidden 256, intermediate 256, 2 layers, 4 query and 2 key/value heads of 64, so that
every linear's input divides by 128. Tensor names are those of published files, which vLLM expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

WORDS = ("What color is the star? Describe it.", "a large red star", "user", "assistant", "system")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Tiny:
    """How a family's tiny model is made."""

    tokens: tuple[str, ...]
    """Special tokens beside the chat's; the first stands for a piece of an image."""
    image_text: str
    """What the chat template writes for an image."""
    config: Callable[[Any], Any]
    """Tokenizer -> configuration."""
    processor: Callable[[Any, str], Any]
    """(tokenizer, chat template) -> processor."""
    published: tuple[tuple[str, str], ...]
    """(prefix in transformers 5, prefix in published files)."""
    roles: dict[str, Any] | None = None
    """Named special tokens the processor asks the tokenizer for."""
    cpu_dtype: str = "float32"
    """What vLLM on a CPU computes in; bfloat16 where its kernels have nothing else."""
    cpu_text: dict[str, Any] = field(default_factory=dict)
    """Of the decoder's configuration, what vLLM on a CPU cannot do otherwise."""
    single_experts: bool = False
    """Whether published files have every expert's tensors by themselves."""
    stored: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor
    """A parameter's name in transformers 5 and its value -> what published files have."""
    unread: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    """Configuration -> further tensors of published files, which transformers does not read."""
    quiet: bool = False
    """Whether no answer says a special token. Where one that stands for a picture or a sound is
    the input, transformers and vLLM look up different embeddings for the blocks."""
    model_type: str = ""
    """Of config.json, where it is not the tiny model's own name."""


def chat_template(image_text: str) -> str:
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] in ['image', 'image_url'] %}{{ '" + image_text + "' }}"
        "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def make_tokenizer(tiny: Tiny) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tiny.tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 30, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=tiny.roles or list(tiny.tokens),
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(tiny.image_text),
    )
    return fast


def text_fields(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + (-len(tokenizer)) % 64,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def common_fields(tokenizer: Any) -> dict[str, Any]:
    return {
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def token_id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def token_ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    """image="<image>": {"image_token_id": its number}."""
    return {f"{name}_token_id": token_id(tokenizer, token) for name, token in tokens.items()}


VISION = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _llava_config(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=128),
        text_config=LlamaConfig(**text_fields(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        **common_fields(tokenizer),
    )


def _llava_processor(tokenizer: Any, template: str) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": 56, "width": 56}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square, **HALF),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _llava_next_config(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=128),
        text_config=MistralConfig(**text_fields(tokenizer, sliding_window=None)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **common_fields(tokenizer),
    )


def _llava_next_processor(tokenizer: Any, template: str) -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=PINPOINTS,
            **HALF,
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _onevision_config(tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, vision_use_head=False
        ),
        text_config=Qwen2Config(**text_fields(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        **common_fields(tokenizer),
    )


def _onevision_processor(tokenizer: Any, template: str) -> Any:
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    square = {"height": 56, "width": 56}
    images = LlavaOnevisionImageProcessorPil(
        size=square,
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
        **HALF,
    )
    return LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square, **HALF),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=template,
    )


_QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


QWEN_VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "out_hidden_size": 256,
    "num_heads": 2,
    "patch_size": 14,
}


def qwen_ids(tokenizer: Any) -> dict[str, Any]:
    start, end = "<|vision_start|>", "<|vision_end|>"
    pads = token_ids(tokenizer, image="<|image_pad|>", video="<|video_pad|>")
    return {**pads, **token_ids(tokenizer, vision_start=start, vision_end=end)}


def _qwen2_vl_config(tokenizer: Any) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        text_config=text_fields(tokenizer, rope_parameters=MROPE),
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


def _qwen2_5_vl_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={**QWEN_VISION, "window_size": 112, "fullatt_block_indexes": [1]},
        text_config=text_fields(tokenizer, rope_parameters=MROPE),
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


def _qwen3_vl_config(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig

    rope = {**MROPE, "mrope_interleaved": True}
    return Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        # More blocks than helpings of image features, as in every published model.
        text_config=text_fields(tokenizer, rope_parameters=rope, num_hidden_layers=3),
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,  # not half of the hidden size: its shapes show which way they lie
}


def _qwen3_vl_moe_config(tokenizer: Any) -> Any:
    from transformers import Qwen3VLMoeConfig

    dense = _qwen3_vl_config(tokenizer)
    return Qwen3VLMoeConfig(
        vision_config=_fields(dense.vision_config),
        text_config=text_fields(
            tokenizer,
            rope_parameters=dict(dense.text_config.rope_parameters),
            num_hidden_layers=3,
            **EXPERTS,
        ),
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a part of a configuration, for that of another family."""
    fields = config if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in fields.items() if name != "model_type"}


def _inputs_first(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Experts as Qwen3-VL's files have them: [E, in, out]."""
    return tensor.transpose(1, 2) if ".mlp.experts." in name else tensor


def _qwen_processor(kind: str) -> Callable[[Any, str], Any]:
    def make(tokenizer: Any, template: str) -> Any:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        video = "Qwen3VLVideoProcessor" if kind == "Qwen3VL" else "Qwen2VLVideoProcessor"
        size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        options = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **HALF}
        return getattr(transformers, f"{kind}Processor")(
            Qwen2VLImageProcessorPil(size=size, **options),
            tokenizer,
            getattr(transformers, video)(size=size, **options),
            chat_template=template,
        )

    return make


def _internvl_config(tokenizer: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    return InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[14, 14]),
        text_config=Qwen2Config(**text_fields(tokenizer)),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        **common_fields(tokenizer),
    )


def _internvl_processor(tokenizer: Any, template: str) -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    square = {"height": 56, "width": 56}
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4, **HALF),
        tokenizer,
        InternVLVideoProcessor(size=square, **HALF),
        image_seq_length=4,
        chat_template=template,
    )


def _gemma3_config(tokenizer: Any) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    text = text_fields(
        tokenizer,
        num_hidden_layers=3,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=64,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        tie_word_embeddings=True,
    )
    return Gemma3Config(
        vision_config=SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, vision_use_head=False
        ),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        **{**common_fields(tokenizer), "tie_word_embeddings": True},
    )


def _gemma3_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, **HALF),
        tokenizer,
        chat_template=template,
        image_seq_length=4,
    )


_IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
)


def _idefics_config(kind: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        vision = getattr(transformers, f"{kind}VisionConfig")
        return getattr(transformers, f"{kind}Config")(
            vision_config=vision(**VISION, image_size=56, patch_size=14),
            text_config=transformers.LlamaConfig(**text_fields(tokenizer)),
            image_token_id=token_id(tokenizer, "<image>"),
            scale_factor=2,
            **common_fields(tokenizer),
        )

    return make


def _idefics_processor(kind: str) -> Callable[[Any, str], Any]:
    def make(tokenizer: Any, template: str) -> Any:
        import importlib

        import transformers

        module = f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}"
        images = getattr(importlib.import_module(module), f"{kind}ImageProcessorPil")
        edge = {"longest_edge": 56}
        processor = images(size={"longest_edge": 112}, max_image_size=edge, **HALF)
        arguments = [processor, tokenizer]
        if kind == "SmolVLM":
            arguments.append(
                transformers.SmolVLMVideoProcessor(
                    size={"longest_edge": 112},
                    max_image_size=edge,
                    video_sampling={"fps": 1, "max_frames": 4, "video_size": edge},
                    **HALF,
                )
            )
        make_ = getattr(transformers, f"{kind}Processor")
        return make_(*arguments, image_seq_len=4, chat_template=template)

    return make


def _mistral3_config(tokenizer: Any) -> Any:
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

    return Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=112, patch_size=14),
        text_config=MistralConfig(**text_fields(tokenizer)),
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        **common_fields(tokenizer),
    )


def _pixtral_config(tokenizer: Any) -> Any:
    from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig

    return LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=56, patch_size=14),
        text_config=MistralConfig(**text_fields(tokenizer, num_hidden_layers=3)),
        image_token_index=token_id(tokenizer, "[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **common_fields(tokenizer),
    )


def _pixtral_processor(merge: int) -> Callable[[Any, str], Any]:
    def make(tokenizer: Any, template: str) -> Any:
        from transformers import PixtralProcessor
        from transformers.models.pixtral.image_processing_pil_pixtral import (
            PixtralImageProcessorPil,
        )

        return PixtralProcessor(
            PixtralImageProcessorPil(size={"longest_edge": 56 * merge}, patch_size=14, **HALF),
            tokenizer,
            patch_size=14,
            spatial_merge_size=merge,
            chat_template=template,
        )

    return make


_GLM_TOKENS = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>") + (
    "<|begin_of_video|>",
    "<|end_of_video|>",
)


def _glm4v_config(tokenizer: Any) -> Any:
    from transformers import Glm4vConfig

    rope: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    rope |= {"rope_type": "default", "mrope_section": [4, 6, 6]}
    text = text_fields(tokenizer, rope_parameters=rope, attention_bias=True)
    return Glm4vConfig(
        vision_config={**QWEN_VISION, "image_size": 56},
        text_config=text,
        **token_ids(
            tokenizer,
            image="<|image|>",
            video="<|video|>",
            image_start="<|begin_of_image|>",
            image_end="<|end_of_image|>",
            video_start="<|begin_of_video|>",
            video_end="<|end_of_video|>",
        ),
        **common_fields(tokenizer),
    )


def _glm_ocr_config(tokenizer: Any) -> Any:
    from transformers import GlmOcrConfig

    large = _glm4v_config(tokenizer).to_dict()
    vision, text = _fields(large["vision_config"]), _fields(large["text_config"])
    del text["attention_bias"], vision["attention_bias"]
    text["intermediate_size"] = 3 * vision["out_hidden_size"]  # vLLM's merger is as wide as this
    return GlmOcrConfig(
        vision_config=vision,
        text_config={**text, "num_nextn_predict_layers": 1},
        **{name: value for name, value in large.items() if name.endswith("_token_id")},
        tie_word_embeddings=False,
    )


def _glm_ocr_mtp(config: Any) -> dict[str, torch.Tensor]:
    """A block behind the last that predicts a second token, which transformers does not read."""
    from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrTextDecoderLayer

    text = config.text_config
    size, number = text.hidden_size, text.num_hidden_layers
    block = GlmOcrTextDecoderLayer(text, 0).state_dict()
    more = {"eh_proj": (size, 2 * size), "enorm": (size,), "hnorm": (size,)}
    more |= {"shared_head.norm": (size,), "shared_head.head": (text.vocab_size, size)}
    block |= {f"{name}.weight": torch.randn(shape) * 0.05 for name, shape in more.items()}
    prefix = f"model.language_model.layers.{number}."
    return {prefix + name: tensor.bfloat16() for name, tensor in block.items()}


def _glm4v_moe_config(tokenizer: Any) -> Any:
    from transformers import Glm4vMoeConfig

    dense = _glm4v_config(tokenizer).to_dict()
    vision, text = dense.pop("vision_config"), dense.pop("text_config")
    text |= {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        **{name: EXPERTS[name] for name in ("num_experts_per_tok", "moe_intermediate_size")},
    }
    parts = {"vision_config": vision, "text_config": text}
    for part in parts.values():
        del part["model_type"]
    ids = {name: value for name, value in dense.items() if name.endswith("_token_id")}
    return Glm4vMoeConfig(**parts, **ids, tie_word_embeddings=False)


def _score_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What moves the choice of experts is in float32; a model begins with zeros."""
    bias = name.endswith("e_score_correction_bias")
    return torch.randn(tensor.shape) * 0.05 if bias else tensor


def _glm4v_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Glm4vProcessor, Glm4vVideoProcessor
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    options = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **HALF}
    return Glm4vProcessor(
        Glm4vImageProcessorPil(size=size, **options),
        tokenizer,
        Glm4vVideoProcessor(size=size, **options),
        chat_template=template,
    )


def _qwen3_5_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return text_fields(
        tokenizer,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        rope_parameters={**rope, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        **more,
    )


def _qwen3_5_config(tokenizer: Any) -> Any:
    from transformers import Qwen3_5Config

    return Qwen3_5Config(
        vision_config={**QWEN_VISION, "num_position_embeddings": 64},
        text_config=_qwen3_5_text(tokenizer, mtp_num_hidden_layers=1),
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


def _qwen3_5_moe_config(tokenizer: Any) -> Any:
    from transformers import Qwen3_5MoeConfig

    dense = _qwen3_5_config(tokenizer)
    text = _fields(dense.text_config)
    return Qwen3_5MoeConfig(
        vision_config=_fields(dense.vision_config),
        text_config={**text, **EXPERTS, "shared_expert_intermediate_size": 256},
        **qwen_ids(tokenizer),
        **common_fields(tokenizer),
    )


def _qwen3_5_mtp(config: Any) -> dict[str, torch.Tensor]:
    """The head that predicts a second token: a block of attention between two norms and a norm."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer

    text = config.get_text_config()
    kind = Qwen3_5MoeDecoderLayer if hasattr(text, "num_experts") else Qwen3_5DecoderLayer
    block = kind(text, text.layer_types.index("full_attention"))
    for name, p in block.named_parameters():
        if name.startswith(("mlp.experts.", "mlp.gate.")):  # left empty by their classes
            p.data.normal_(std=0.05)
    tensors = {f"mtp.layers.0.{name}": p.detach() for name, p in block.named_parameters()}
    size = text.hidden_size
    tensors["mtp.fc.weight"] = torch.randn(size, 2 * size) * 0.05
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = torch.randn(size) * 0.2
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


_MINICPM_ROLES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def _minicpmv4_6_config(tokenizer: Any) -> Any:
    from transformers import MiniCPMV4_6Config

    return MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config=_qwen3_5_text(tokenizer, model_type="qwen3_5_text"),
        insert_layer_id=0,
        image_size=64,
        **token_ids(tokenizer, image="<|image_pad|>", video="<|video_pad|>"),
        **common_fields(tokenizer),
    )


def _minicpmv4_6_processor(tokenizer: Any, template: str) -> Any:
    from transformers import MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
        MiniCPMV4_6ImageProcessorPil,
    )

    options = {"patch_size": 8, "scale_resolution": 64, "max_slice_nums": 4}
    return MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessorPil(**options, **HALF),
        MiniCPMV4_6VideoProcessor(**options, **HALF),
        tokenizer,
        chat_template=template,
    )


def _minicpmv4_7_config(tokenizer: Any) -> Any:
    from transformers import MiniCPMV4_7Config

    marks = {"image_start": "<image>", "image_end": "</image>", "newline": "\u010a"}
    marks |= {"slice_start": "<slice>", "slice_end": "</slice>"}
    fields = _minicpmv4_6_config(tokenizer).to_dict()
    return MiniCPMV4_7Config(
        vision_config=fields["vision_config"],
        text_config=fields["text_config"],
        **{f"{name}_id": token_id(tokenizer, mark) for name, mark in marks.items()},
        **{name: fields[name] for name in ("insert_layer_id", "image_size")},
        **{name: fields[name] for name in ("image_token_id", "video_token_id")},
        **common_fields(tokenizer),
    )


def _minicpmv4_7_processor(tokenizer: Any, template: str) -> Any:
    from transformers import MiniCPMV4_7Processor

    parts = _minicpmv4_6_processor(tokenizer, template)
    return MiniCPMV4_7Processor(
        parts.image_processor, parts.video_processor, tokenizer, chat_template=template
    )


_GEMMA4_ROLES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
_GEMMA4_TOKENS = (*_GEMMA4_ROLES.values(), "<|video|>")


_GEMMA4_VISION = {
    **VISION,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
    "default_output_length": 70,
}


def _gemma4_fields(tokenizer: Any) -> dict[str, Any]:
    """Of the configuration, all but the vision tower."""
    text = text_fields(
        tokenizer,
        num_hidden_layers=3,
        global_head_dim=128,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        use_bidirectional_attention="vision",
        initializer_range=0.02,  # or tied embeddings repeat a token for ever
        tie_word_embeddings=True,
    )
    ids = token_ids(tokenizer, image="<|image|>", video="<|video|>", audio="<|audio|>")
    ids |= token_ids(tokenizer, boi="<|image>", eoi="<image|>", boa="<|audio>")
    ids["eoa_token_index"] = token_id(tokenizer, "<audio|>")
    return {**common_fields(tokenizer), **ids, "text_config": text, "tie_word_embeddings": True}


def _gemma4_config(tokenizer: Any, **text: Any) -> Any:
    from transformers import Gemma4Config

    fields = _gemma4_fields(tokenizer)
    fields["text_config"] |= {"hidden_size_per_layer_input": 0, **text}
    return Gemma4Config(vision_config=_GEMMA4_VISION, **fields)


def _gemma4_e2b_config(tokenizer: Any) -> Any:
    """As E2B: the last blocks read the keys of earlier ones and are wider, and there is sound."""
    from transformers import Gemma4Config

    fields = _gemma4_fields(tokenizer)
    fields["text_config"] |= {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": fields["text_config"]["vocab_size"],
    }
    audio = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "subsampling_conv_channels": [8, 4],
        "output_proj_dims": 64,
    }
    return Gemma4Config(vision_config=_GEMMA4_VISION, audio_config=audio, **fields)


def _gemma4_unread(config: Any) -> dict[str, torch.Tensor]:
    """Keys and values that published files have of the blocks which read those of others."""
    text = config.text_config
    found = {}
    for index in range(text.num_hidden_layers - text.num_kv_shared_layers, text.num_hidden_layers):
        layer = text.per_layer_config[index]
        attention = f"model.language_model.layers.{index}.self_attn"
        size = (layer.num_key_value_heads * layer.head_dim, text.hidden_size)
        found |= {f"{attention}.{x}_proj.weight": torch.randn(size) for x in "kv"}
        found[f"{attention}.k_norm.weight"] = torch.ones(layer.head_dim)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def _gemma4_moe_config(tokenizer: Any) -> Any:
    return _gemma4_config(
        tokenizer,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=160,  # no multiple of 128, as that of the published model
    )


def _gemma4_unified_config(tokenizer: Any) -> Any:
    from transformers import Gemma4UnifiedConfig

    return Gemma4UnifiedConfig(
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 256,
            "output_proj_dims": 256,
            "mm_posemb_size": 70,
            "num_soft_tokens": 70,
        },
        **_gemma4_fields(tokenizer),
    )


def _gemma4_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4Processor, Gemma4VideoProcessor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    options = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(**options),
        tokenizer,
        Gemma4VideoProcessor(**options),
        chat_template=template,
        image_seq_length=70,
    )


def _gemma4_unified_processor(tokenizer: Any, template: str) -> Any:
    from transformers import (
        Gemma4UnifiedAudioFeatureExtractor,
        Gemma4UnifiedImageProcessor,
        Gemma4UnifiedProcessor,
        Gemma4UnifiedVideoProcessor,
    )

    options = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return Gemma4UnifiedProcessor(
        Gemma4UnifiedAudioFeatureExtractor(),
        Gemma4UnifiedImageProcessor(**options),
        tokenizer,
        Gemma4UnifiedVideoProcessor(**options),
        chat_template=template,
        image_seq_length=70,
    )


_LFM_TOKENS = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>") + tuple(
    f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)
)


def _lfm2_config(tokenizer: Any) -> Any:
    from transformers import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

    types = ["conv", "full_attention", "conv"]
    text = text_fields(
        tokenizer,
        num_hidden_layers=3,
        layer_types=types,
        block_auto_adjust_ff_dim=False,
        conv_dim=256,
        block_dim=256,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    return Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(
            **VISION, patch_size=14, num_patches=64, vision_use_head=False
        ),
        text_config=Lfm2Config(**text),
        image_token_id=token_id(tokenizer, "<image>"),
        projector_hidden_size=256,
        **{**common_fields(tokenizer), "tie_word_embeddings": True},
    )


def _lfm2_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    images = Lfm2VlImageProcessor(
        encoder_patch_size=14,
        tile_size=56,
        min_image_tokens=4,
        max_image_tokens=16,
        max_tiles=4,
        size={"height": 56, "width": 56},
    )
    return Lfm2VlProcessor(images, tokenizer, chat_template=template)


def _exaone4_5_mtp(config: Any) -> dict[str, torch.Tensor]:
    """Of the head that predicts a second token, as much as shows that it is left as it is."""
    size = config.get_text_config().hidden_size
    shapes = {"fc": (size, 2 * size), "norm": (size,), "layers.0.self_attn.q_proj": (size, size)}
    return {f"mtp.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def _exaone4_5_config(tokenizer: Any) -> Any:
    from transformers import Exaone4_5_Config

    text = text_fields(
        tokenizer,
        num_hidden_layers=4,
        sliding_window=32,
        sliding_window_pattern="LLLG",
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Exaone4_5_Config(
        vision_config={
            **QWEN_VISION,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        text_config=text,
        **token_ids(tokenizer, image="<|image_pad|>", video="<|video_pad|>"),
        **common_fields(tokenizer),
    )


_PADDLE_ROLES = {"image_token": "<|IMAGE_PLACEHOLDER|>"}


def _paddleocr_vl_config(tokenizer: Any) -> Any:
    from transformers import PaddleOCRVLConfig

    return PaddleOCRVLConfig(
        # One position: of several, transformers aligns the corners of the table, and vLLM does not.
        vision_config={**VISION, "image_size": 14, "patch_size": 14},
        text_config=text_fields(tokenizer, rope_parameters=MROPE),
        **token_ids(tokenizer, image="<|IMAGE_PLACEHOLDER|>"),
        **token_ids(tokenizer, vision_start="<|IMAGE_START|>", vision_end="<|IMAGE_END|>"),
        **common_fields(tokenizer),
    )


def _paddleocr_vl_processor(tokenizer: Any, template: str) -> Any:
    from transformers import PaddleOCRVLProcessor
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
        PaddleOCRVLImageProcessorPil,
    )

    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    images = PaddleOCRVLImageProcessorPil(size=size, patch_size=14, merge_size=2, **HALF)
    return PaddleOCRVLProcessor(images, tokenizer, chat_template=template)


def _paddleocr_vl_unread(config: Any) -> dict[str, torch.Tensor]:
    """Of the tower, what is left of its training."""
    size = config.vision_config.hidden_size
    names = {"embeddings.packing_position_embedding.weight": (8, size), "head.probe": (1, 1, size)}
    return {f"visual.vision_model.{n}": torch.randn(s).bfloat16() for n, s in names.items()}


_MUSE_TOKENS = ("<|patch|>", "<|image|>", "<|video|>", "<|image_start|>", "<|image_end|>") + (
    "<|vid_start|>",
    "<|vid_end|>",
    "<|vid_frame_separator|>",
)


def _muse_glimmer_config(tokenizer: Any) -> Any:
    from transformers import MuseGlimmerConfig

    vision = {**VISION, "pos_emb_height": 4, "pos_emb_width": 4, "patch_size": 14}
    return MuseGlimmerConfig(
        # vLLM looks for the sizes of what is behind the tower in the tower's part.
        vision_config={**vision, "output_dim": 512, "adapter_dim": 128},
        text_config=text_fields(tokenizer, sliding_window=32, output_multiplier=1.0),
        out_hidden_size=512,
        projector_hidden_size=128,
        **token_ids(tokenizer, image="<|patch|>", video="<|video|>"),
        **common_fields(tokenizer),
    )


def _muse_glimmer_processor(tokenizer: Any, template: str) -> Any:
    from transformers import (
        MuseGlimmerImageProcessor,
        MuseGlimmerProcessor,
        MuseGlimmerVideoProcessor,
    )

    return MuseGlimmerProcessor(
        MuseGlimmerImageProcessor(**HALF),
        MuseGlimmerVideoProcessor(**HALF),
        tokenizer,
        chat_template=template,
    )


_LLAVA_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)
_CLIP_NAMES = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    *_LLAVA_NAMES,
)
_QWEN_NAMES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("lm_head.", "lm_head."),
)
_PADDLE_NAMES = (
    ("model.projector.", "mlp_AR."),
    *_QWEN_NAMES,
)
_SAME_NAMES = (("", ""),)
_UNIFIED_NAMES = (
    ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
    ("model.embed_vision.", "model.vision_embedder."),
    *_SAME_NAMES,
)
_LFM_NAMES = (("model.vision_tower.", "model.vision_tower.vision_model."), *_SAME_NAMES)

FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(("<image>",), "<image>", _llava_config, _llava_processor, _CLIP_NAMES),
    "pixtral": Tiny(
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        _pixtral_config,
        _pixtral_processor(1),
        _LLAVA_NAMES,
        model_type="llava",
    ),
    "llava_next": Tiny(
        ("<image>",), "<image>", _llava_next_config, _llava_next_processor, _CLIP_NAMES
    ),
    "llava_onevision": Tiny(
        ("<image>", "<video>"), "<image>", _onevision_config, _onevision_processor, _CLIP_NAMES
    ),
    "qwen2_vl": Tiny(
        _QWEN_TOKENS, _QWEN_IMAGE, _qwen2_vl_config, _qwen_processor("Qwen2VL"), _QWEN_NAMES
    ),
    "qwen2_5_vl": Tiny(
        _QWEN_TOKENS, _QWEN_IMAGE, _qwen2_5_vl_config, _qwen_processor("Qwen2_5_VL"), _QWEN_NAMES
    ),
    "qwen3_vl": Tiny(
        _QWEN_TOKENS, _QWEN_IMAGE, _qwen3_vl_config, _qwen_processor("Qwen3VL"), _SAME_NAMES
    ),
    "qwen3_vl_moe": Tiny(
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        _qwen3_vl_moe_config,
        _qwen_processor("Qwen3VL"),
        _SAME_NAMES,
        stored=_inputs_first,
    ),
    "internvl": Tiny(
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        "<IMG_CONTEXT>\\n",
        _internvl_config,
        _internvl_processor,
        _LLAVA_NAMES,
        {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    ),
    "gemma3": Tiny(
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n")
        + ("\n\n\n\n",),
        "<start_of_image>",
        _gemma3_config,
        _gemma3_processor,
        _CLIP_NAMES,
        {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "idefics3": Tiny(
        _IDEFICS_TOKENS,
        "<image>",
        _idefics_config("Idefics3"),
        _idefics_processor("Idefics3"),
        _SAME_NAMES,
    ),
    "smolvlm": Tiny(
        _IDEFICS_TOKENS,
        "<image>",
        _idefics_config("SmolVLM"),
        _idefics_processor("SmolVLM"),
        _SAME_NAMES,
    ),
    "mistral3": Tiny(
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        _mistral3_config,
        _pixtral_processor(2),
        _LLAVA_NAMES,
    ),
    "glm4v": Tiny(
        _GLM_TOKENS,
        "<|begin_of_image|><|image|><|end_of_image|>",
        _glm4v_config,
        _glm4v_processor,
        _SAME_NAMES,
    ),
    "glm_ocr": Tiny(
        _GLM_TOKENS,
        "<|begin_of_image|><|image|><|end_of_image|>",
        _glm_ocr_config,
        _glm4v_processor,
        _SAME_NAMES,
        unread=_glm_ocr_mtp,
    ),
    "glm4v_moe": Tiny(
        _GLM_TOKENS,
        "<|begin_of_image|><|image|><|end_of_image|>",
        _glm4v_moe_config,
        _glm4v_processor,
        _SAME_NAMES,
        single_experts=True,
        stored=_score_bias,
    ),
    "qwen3_5": Tiny(
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        _qwen3_5_config,
        _qwen_processor("Qwen3VL"),
        _SAME_NAMES,
        cpu_dtype="bfloat16",
        unread=_qwen3_5_mtp,
    ),
    "qwen3_5_moe": Tiny(
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        _qwen3_5_moe_config,
        _qwen_processor("Qwen3VL"),
        _SAME_NAMES,
        cpu_dtype="bfloat16",
        unread=_qwen3_5_mtp,
    ),
    "minicpmv4_6": Tiny(
        tuple(_MINICPM_ROLES.values()),
        "<|image_pad|>",
        _minicpmv4_6_config,
        _minicpmv4_6_processor,
        _SAME_NAMES,
        _MINICPM_ROLES,
        cpu_dtype="bfloat16",
    ),
    "minicpmv4_7": Tiny(
        tuple(_MINICPM_ROLES.values()),
        "<|image_pad|>",
        _minicpmv4_7_config,
        _minicpmv4_7_processor,
        _SAME_NAMES,
        _MINICPM_ROLES,
        cpu_dtype="bfloat16",
    ),
    "gemma4": Tiny(
        _GEMMA4_TOKENS,
        "<|image|>",
        _gemma4_config,
        _gemma4_processor,
        _SAME_NAMES,
        _GEMMA4_ROLES,
        cpu_text={"use_bidirectional_attention": None},  # its attention is causal
    ),
    "gemma4_e2b": Tiny(
        _GEMMA4_TOKENS,
        "<|image|>",
        _gemma4_e2b_config,
        _gemma4_processor,
        _SAME_NAMES,
        _GEMMA4_ROLES,
        cpu_text={"use_bidirectional_attention": None},
        quiet=True,
        unread=_gemma4_unread,
        model_type="gemma4",
    ),
    "gemma4_moe": Tiny(
        _GEMMA4_TOKENS,
        "<|image|>",
        _gemma4_moe_config,
        _gemma4_processor,
        _SAME_NAMES,
        _GEMMA4_ROLES,
        cpu_text={"use_bidirectional_attention": None},
        model_type="gemma4",
    ),
    "gemma4_unified": Tiny(
        _GEMMA4_TOKENS,
        "<|image|>",
        _gemma4_unified_config,
        _gemma4_unified_processor,
        _UNIFIED_NAMES,
        _GEMMA4_ROLES,
        cpu_text={"use_bidirectional_attention": None},
    ),
    "exaone4_5": Tiny(
        ("<|image_pad|>", "<|video_pad|>", "<vision>", "</vision>"),
        "<vision><|image_pad|></vision>",
        _exaone4_5_config,
        _qwen_processor("Exaone4_5_"),
        _SAME_NAMES,
        unread=_exaone4_5_mtp,
    ),
    "paddleocr_vl": Tiny(
        ("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"),
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        _paddleocr_vl_config,
        _paddleocr_vl_processor,
        _PADDLE_NAMES,
        _PADDLE_ROLES,
        unread=_paddleocr_vl_unread,
    ),
    "muse_glimmer": Tiny(
        _MUSE_TOKENS,
        "<|patch|>",
        _muse_glimmer_config,
        _muse_glimmer_processor,
        _SAME_NAMES,
        quiet=True,
    ),
    "lfm2_vl": Tiny(_LFM_TOKENS, "<image>", _lfm2_config, _lfm2_processor, _LFM_NAMES),
}


def row_of(family: str) -> str:
    """The row of architectures.py that a tiny model is of."""
    return FAMILIES[family].model_type or family


def published_name(family: str, name: str) -> str:
    """The name that published files have for a parameter of the transformers 5 model."""
    for ours, theirs in FAMILIES[family].published:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{family}: no published name for {name}")


def tiny_model(family: str, directory: Path, seed: int = 0, **text: Any) -> Path:
    """Writes the tiny random model of a family, in bf16, to a new directory.

    text: of the decoder's configuration, what is to be otherwise.
    """
    tokenizer = make_tokenizer(FAMILIES[family])
    torch.manual_seed(seed)
    config = FAMILIES[family].config(tokenizer)
    for name, value in text.items():
        setattr(config.get_text_config(), name, value)
    return write_random(family, config, tokenizer, directory)


def write_random(family: str, config: Any, tokenizer: Any, directory: Path) -> Path:
    """Writes a random model of a family, in bf16, to a new directory, with the tiny processor."""
    from transformers import AutoModelForImageTextToText

    tiny = FAMILIES[family]
    config.dtype = "bfloat16"
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)  # or a lost bias would not show
            elif ("norm" in name or ".router." in name) and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith(".router.scale"):  # or all experts would be as good as alike
                parameter.mul_(len(parameter) ** 0.5)
        if tiny.quiet:
            model.get_output_embeddings().weight[: 3 + len(tiny.tokens)] *= 0.01
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    directory.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tiny.processor(tokenizer, chat_template(tiny.image_text)).save_pretrained(directory)
    tensors = {
        published_name(family, name): tiny.stored(name, tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    if tiny.single_experts:
        tensors = _single_experts(tensors)
    tensors |= tiny.unread(config)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of experts as [out, in] each, under their numbers; of [E, out, in]."""
    found = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not owner.endswith(".experts"):
            found[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for e, whole in enumerate(tensor):
            for part, matrix in zip(parts, whole.chunk(len(parts)), strict=True):
                found[f"{owner}.{e}.{part}.weight"] = matrix.clone()
    return found


def one_sample(directory: Path) -> str:
    """A JSONL with one question about a red picture, written into a directory; its path."""
    Image.new("RGB", (56, 56), "red").save(directory / "red.png")
    content = [
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "text", "text": "What color is the star?"},
    ]
    line = {"id": "1", "messages": [{"role": "user", "content": content}], "answer": "red"}
    path = directory / "calib.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return str(path)
