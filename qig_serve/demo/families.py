"""The families of demonstration models; a family is a row of FAMILIES.

A family knows its chat text for an image, its Hugging Face classes, the names its published
checkpoints give to tensors, how pictures become image tokens, and which positions they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qig_serve.demo.family_row import (
    IMAGE_TOKENS,
    Family,
    Positions,
    common_fields,
    decoder_sizes,
    pixel_options,
)
from qig_serve.demo.pictures import CELL, GRID, IMAGE_SIZE

if TYPE_CHECKING:
    from qig_serve.demo.model import ModelSpec


def _llava_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=spec.vision_hidden,
            intermediate_size=spec.vision_intermediate,
            num_hidden_layers=spec.vision_layers,
            num_attention_heads=spec.vision_heads,
            image_size=IMAGE_SIZE,
            patch_size=CELL,
            projection_dim=spec.vision_hidden,
        ),
        text_config=Qwen2Config(**decoder_sizes(spec), **common_fields(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        **common_fields(tokenizer),
    )


def _llava_processor(tokenizer: Any, template: str) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=square, crop_size=square, do_center_crop=False, **pixel_options()
        ),
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_image_tokens(model: Any, pixels: Any) -> Any:
    import torch

    features = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    return torch.stack(list(features))


def _in_a_row(start: int) -> Positions:
    return [(start + i,) * 3 for i in range(IMAGE_TOKENS)]


# Four patches merge into one image token, which is one cell again.
_MERGE = 2
_PATCH = CELL // _MERGE


def _qwen2_vl_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Qwen2VLConfig

    half = spec.hidden // spec.heads // 2  # rotary pairs per head
    time = half // 4
    rows = (half - time) // 2
    return Qwen2VLConfig(
        vision_config={
            "depth": spec.vision_layers,
            "embed_dim": spec.vision_hidden,
            "hidden_size": spec.hidden,
            "mlp_ratio": spec.vision_intermediate // spec.vision_hidden,
            "num_heads": spec.vision_heads,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
        },
        text_config={
            **decoder_sizes(spec),
            **common_fields(tokenizer),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [time, rows, half - time - rows],
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        **common_fields(tokenizer),
    )


def _qwen2_vl_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    area = IMAGE_SIZE * IMAGE_SIZE
    sizes = {
        "size": {"shortest_edge": area, "longest_edge": area},
        "patch_size": _PATCH,
        "merge_size": _MERGE,
        "temporal_patch_size": 2,
        **pixel_options(),
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=template,
    )


def _qwen2_vl_image_tokens(model: Any, pixels: Any) -> Any:
    import torch

    count, side = pixels.shape[0], IMAGE_SIZE // _PATCH
    # [B, C, row, merge, patch, column, merge, patch], as the image processor cuts a picture up;
    # a still picture is shown twice, for the two frames of a temporal patch.
    cut = pixels.reshape(count, 3, GRID, _MERGE, _PATCH, GRID, _MERGE, _PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    patches = cut.reshape(count * side * side, -1)
    grid = torch.tensor([[1, side, side]] * count, device=pixels.device)
    features = model.model.get_image_features(patches, grid, return_dict=True).pooler_output
    return torch.stack(list(features))


def _on_a_grid(start: int) -> Positions:
    return [(start, start + row, start + column) for row in range(GRID) for column in range(GRID)]


def _qwen3_vl_moe_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Qwen3VLMoeConfig

    dense = _qwen2_vl_config(spec, tokenizer)
    text = {**decoder_sizes(spec), **common_fields(tokenizer), "rms_norm_eps": 1e-6}
    rope = {**dense.text_config.rope_parameters, "mrope_interleaved": True}
    config = Qwen3VLMoeConfig(
        vision_config={
            "depth": spec.vision_layers,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_intermediate,
            "num_heads": spec.vision_heads,
            "out_hidden_size": spec.hidden,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "num_position_embeddings": (IMAGE_SIZE // _PATCH) ** 2,
            "deepstack_visual_indexes": [],
        },
        text_config={
            **text,
            "head_dim": spec.hidden // spec.heads,
            "rope_parameters": rope,
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.intermediate,
        },
        image_token_id=dense.image_token_id,
        video_token_id=dense.video_token_id,
        vision_start_token_id=dense.vision_start_token_id,
        vision_end_token_id=dense.vision_end_token_id,
        **common_fields(tokenizer),
    )
    config._experts_implementation = "eager"  # one expert after another: all that a CPU has
    return config


def _qwen3_vl_processor(tokenizer: Any, template: str) -> Any:
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    processor = _qwen2_vl_processor(tokenizer, template)
    images = processor.image_processor
    video = Qwen3VLVideoProcessor(
        size=images.size,
        patch_size=_PATCH,
        merge_size=_MERGE,
        temporal_patch_size=2,
        **pixel_options(),
    )
    return Qwen3VLProcessor(images, tokenizer, video, chat_template=template)


def _inputs_first(name: str, tensor: Any) -> Any:
    """Experts as Qwen3-VL's files have them, [E, in, out]."""
    return tensor.transpose(1, 2) if ".mlp.experts." in name else tensor


def _internvl_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=spec.vision_hidden,
            intermediate_size=spec.vision_intermediate,
            num_hidden_layers=spec.vision_layers,
            num_attention_heads=spec.vision_heads,
            image_size=[IMAGE_SIZE, IMAGE_SIZE],
            patch_size=[_PATCH, _PATCH],
        ),
        text_config=Qwen2Config(**decoder_sizes(spec), **common_fields(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=1 / _MERGE,
        vision_feature_layer=-1,
        **common_fields(tokenizer),
    )


def _internvl_processor(tokenizer: Any, template: str) -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=square, crop_to_patches=False, **pixel_options()),
        tokenizer,
        InternVLVideoProcessor(size=square, **pixel_options()),
        image_seq_length=IMAGE_TOKENS,
        chat_template=template,
    )


def _internvl_image_tokens(model: Any, pixels: Any) -> Any:
    import torch

    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    return torch.stack(list(features))


_LANGUAGE_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_QWEN2_VL = Family(
    special_tokens=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    image_token="<|image_pad|>",
    image_text="<|vision_start|><|image_pad|><|vision_end|>",
    image_frame=("<|vision_start|>", "<|vision_end|>"),
    make_config=_qwen2_vl_config,
    model_class="Qwen2VLForConditionalGeneration",
    make_processor=_qwen2_vl_processor,
    image_processor_type="Qwen2VLImageProcessor",
    published=(
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
        ("model.visual.", "visual."),
    ),
    image_tokens=_qwen2_vl_image_tokens,
    image_positions=_on_a_grid,
    multi_axis=True,
)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        special_tokens=("<image>",),
        image_token="<image>",
        image_text="<image>",
        image_frame=("", ""),
        make_config=_llava_config,
        model_class="LlavaForConditionalGeneration",
        make_processor=_llava_processor,
        image_processor_type="CLIPImageProcessor",
        published=(
            *_LANGUAGE_NAMES,
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
        image_tokens=_llava_image_tokens,
        image_positions=_in_a_row,
        unused=("model.vision_tower.post_layernorm.",),  # features are taken before it
    ),
    "qwen2_vl": _QWEN2_VL,
    "qwen3_vl_moe": replace(
        _QWEN2_VL,
        make_config=_qwen3_vl_moe_config,
        model_class="Qwen3VLMoeForConditionalGeneration",
        make_processor=_qwen3_vl_processor,
        published=(("", ""),),
        as_published=_inputs_first,
    ),
    "internvl": Family(
        special_tokens=("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        image_token="<IMG_CONTEXT>",
        image_text="<IMG_CONTEXT>\\n",
        image_frame=("<img>", "</img>\n"),
        make_config=_internvl_config,
        model_class="InternVLForConditionalGeneration",
        make_processor=_internvl_processor,
        image_processor_type="GotOcr2ImageProcessor",
        published=(*_LANGUAGE_NAMES, ("model.", "")),
        image_tokens=_internvl_image_tokens,
        image_positions=_in_a_row,
        token_roles=(
            ("context_image_token", "<IMG_CONTEXT>"),
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("video_token", "<video>"),
        ),
    ),
}


def get_family(name: str) -> Family:
    """Looks a family up by its Hugging Face model type."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
