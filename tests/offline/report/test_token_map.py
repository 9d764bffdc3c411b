"""Token maps of every family: change a known region, see which features change, map them back.

The models are tiny and random, but their towers and processors are the real ones: a feature
changes most where its pixels did, so a wrong order of tiles, rows or merged patches shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qig_serve.errors import UserError
from qig_serve.offline.report.token_map import grid_boxes, heat_map, token_boxes

Built = tuple[Any, Any, Any]  # model, processor, config

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "num_heads": 2,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}


def _llava(crop: bool) -> Built:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaModel, Qwen2Config
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=Qwen2Config(**TEXT),
        image_token_id=5,
        vision_feature_layer=-1,
    )
    square = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 64} if crop else square, crop_size=square, do_center_crop=crop
    )
    return LlavaModel(config), SimpleNamespace(image_processor=images), config


def _llava_next() -> Built:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextModel, Qwen2Config
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    pinpoints = [[64, 128], [128, 64], [128, 128], [64, 192], [192, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=Qwen2Config(**TEXT),
        image_token_index=5,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_grid_pinpoints=pinpoints,
    )
    return LlavaNextModel(config), SimpleNamespace(image_processor=images), config


def _llava_onevision(most: int) -> Built:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionModel,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    pinpoints = [[64 * r, 64 * c] for r in range(1, 4) for c in range(1, 4)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=Qwen2Config(**TEXT),
        image_token_id=5,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 64, "width": 64}, image_grid_pinpoints=pinpoints
    )
    return LlavaOnevisionModel(config), SimpleNamespace(image_processor=images), config


def _qwen_vl(name: str, vision: dict[str, Any], patch: int = 14, **text: int) -> Built:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config={**TEXT, **MROPE, **text}, image_token_id=5
    )
    pixels = (2 * patch) ** 2  # of an image token
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=pixels * 16, max_pixels=pixels * 60
    )
    model = getattr(transformers, f"{name}Model")(config)
    return model, SimpleNamespace(image_processor=images), config


def _qwen3_vl() -> Built:
    vision = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen_vl("Qwen3VL", {**QWEN_VISION, **vision}, 16, head_dim=16)


def _internvl() -> Built:
    from transformers import InternVLConfig, InternVLModel
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    config = InternVLConfig(
        vision_config={**VISION, "image_size": [64, 64], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=5,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    processor = SimpleNamespace(image_processor=images, image_seq_length=16)
    return InternVLModel(config), processor, config


def _idefics3(name: str = "Idefics3") -> Built:
    import transformers

    place = f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}"
    make_images = getattr(import_module(place), f"{name}ImageProcessorPil")
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=5,
        scale_factor=2,
    )
    images = make_images(size={"longest_edge": 192}, max_image_size={"longest_edge": 64})
    model = getattr(transformers, f"{name}Model")(config)
    return model, SimpleNamespace(image_processor=images, image_seq_len=16), config


def _gemma3() -> Built:
    from transformers import Gemma3Config, Gemma3Model
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    config = Gemma3Config(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config={**TEXT, "head_dim": 16},
        image_token_id=5,
        mm_tokens_per_image=16,
    )
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, do_pan_and_scan=False)
    return Gemma3Model(config), SimpleNamespace(image_processor=images), config


def _mistral3() -> Built:
    from transformers import Mistral3Config, Mistral3Model
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    config = Mistral3Config(
        vision_config={**VISION, "image_size": 160, "patch_size": 8},
        text_config={"model_type": "mistral", **TEXT},
        image_token_index=5,
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 160}, patch_size=16)
    return Mistral3Model(config), SimpleNamespace(image_processor=images), config


def _pixtral() -> Built:
    from transformers import LlavaConfig, LlavaModel
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    vision = {"model_type": "pixtral", **VISION, "image_size": 160}
    config = LlavaConfig(
        vision_config={**vision, "patch_size": 16},
        text_config={"model_type": "mistral", **TEXT},
        image_token_index=5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 160}, patch_size=16)
    return LlavaModel(config), SimpleNamespace(image_processor=images), config


def _paddleocr_vl() -> Built:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLModel
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
        PaddleOCRVLImageProcessorPil,
    )

    config = PaddleOCRVLConfig(
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        text_config={**TEXT, "head_dim": 16, **MROPE},
        image_token_id=5,
    )
    size = {"shortest_edge": 28 * 28 * 16, "longest_edge": 28 * 28 * 60}
    images = PaddleOCRVLImageProcessorPil(size=size)
    return PaddleOCRVLModel(config), SimpleNamespace(image_processor=images), config


def _muse_glimmer() -> Built:
    from transformers import MuseGlimmerConfig, MuseGlimmerImageProcessor, MuseGlimmerModel

    # Windows of 8 x 8 patches: the tower reorders them, and puts them back.
    vision = {"pos_emb_height": 8, "pos_emb_width": 8, "patch_size": 8}
    config = MuseGlimmerConfig(
        vision_config={**VISION, **vision, "num_hidden_layers": 2},
        text_config={**TEXT, "head_dim": 16},
        out_hidden_size=128,
        projector_hidden_size=32,
        image_token_id=5,
    )
    images = MuseGlimmerImageProcessor(patch_size=8, max_image_tokens=60)
    return MuseGlimmerModel(config), SimpleNamespace(image_processor=images), config


def _glm_ocr() -> Built:
    from transformers import GlmOcrConfig, GlmOcrModel

    _, processor, large = _glm4v()
    config = GlmOcrConfig(
        vision_config=QWEN_VISION,
        text_config={**TEXT, "rope_parameters": dict(large.text_config.rope_parameters)},
        image_token_id=5,
    )
    return GlmOcrModel(config), processor, config


def _glm4v() -> Built:
    from transformers import Glm4vConfig, Glm4vModel
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    config = Glm4vConfig(
        vision_config={**QWEN_VISION, "image_size": 112},
        text_config={**TEXT, **MROPE},
        image_token_id=5,
    )
    size = {"shortest_edge": 28 * 28 * 64, "longest_edge": 28 * 28 * 120}
    return (
        Glm4vModel(config),
        SimpleNamespace(image_processor=Glm4vImageProcessorPil(size=size)),
        config,
    )


def _qwen3_5() -> Built:
    from transformers import Qwen3_5Config, Qwen3_5Model

    _, processor, _ = _qwen3_vl()
    config = Qwen3_5Config(
        vision_config={**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 64},
        text_config={
            **TEXT,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        image_token_id=5,
    )
    return Qwen3_5Model(config), processor, config


def _minicpmv4_6(mode: str) -> Built:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6Model
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
        MiniCPMV4_6ImageProcessorPil,
    )

    config = MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 128, "patch_size": 4},
        text_config={
            **TEXT,
            "model_type": "qwen3_5_text",
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        insert_layer_id=0,
        image_token_id=5,
        downsample_mode=mode,
    )
    images = MiniCPMV4_6ImageProcessorPil(
        patch_size=4, scale_resolution=112, max_slice_nums=4, downsample_mode=mode
    )
    return MiniCPMV4_6Model(config), SimpleNamespace(image_processor=images), config


def _gemma4() -> Built:
    from transformers import Gemma4Config, Gemma4Model
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    config = Gemma4Config(
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        text_config={**TEXT, "head_dim": 16, "hidden_size_per_layer_input": 0},
        image_token_id=5,
    )
    images = Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    return Gemma4Model(config), SimpleNamespace(image_processor=images), config


def _gemma4_unified() -> Built:
    from transformers import (
        Gemma4UnifiedConfig,
        Gemma4UnifiedImageProcessor,
        Gemma4UnifiedModel,
    )

    config = Gemma4UnifiedConfig(
        vision_config={
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "output_proj_dims": 32,
            "mm_posemb_size": 70,
        },
        text_config={**TEXT, "head_dim": 16},
        image_token_id=5,
    )
    images = Gemma4UnifiedImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    return Gemma4UnifiedModel(config), SimpleNamespace(image_processor=images), config


def _lfm2_vl() -> Built:
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlModel

    config = Lfm2VlConfig(
        vision_config={**VISION, "patch_size": 8, "num_patches": 64},
        text_config={"model_type": "lfm2", **TEXT},
        image_token_id=5,
        projector_hidden_size=32,
    )
    images = Lfm2VlImageProcessor(
        encoder_patch_size=8,
        tile_size=64,
        min_image_tokens=40,
        max_image_tokens=64,
        max_tiles=4,
        max_pixels_tolerance=1.0,
    )
    return Lfm2VlModel(config), SimpleNamespace(image_processor=images), config


FAMILIES: dict[str, Callable[[], Built]] = {
    "llava": lambda: _llava(crop=False),
    "llava-center-crop": lambda: _llava(crop=True),
    "llava-next": _llava_next,
    "llava-onevision": lambda: _llava_onevision(9),
    "llava-onevision-shrunk": lambda: _llava_onevision(2),
    "qwen2-vl": lambda: _qwen_vl(
        "Qwen2VL", {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    ),
    # Windows of 4 x 4 merged patches: the tower reorders them, and puts them back.
    "qwen2.5-vl": lambda: _qwen_vl(
        "Qwen2_5_VL",
        {**QWEN_VISION, "depth": 2, "window_size": 112, "fullatt_block_indexes": [1]},
    ),
    "qwen3-vl": _qwen3_vl,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "pixtral": _pixtral,
    "glm4v": _glm4v,
    "glm-ocr": _glm_ocr,
    "paddleocr-vl": _paddleocr_vl,
    "muse-glimmer": _muse_glimmer,
    "qwen3.5": _qwen3_5,
    "minicpmv4.6": lambda: _minicpmv4_6("16x"),
    "minicpmv4.6-4x": lambda: _minicpmv4_6("4x"),
    "gemma4": _gemma4,
    "gemma4-unified": _gemma4_unified,
    "lfm2-vl": _lfm2_vl,
}


def _features(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Image features [tokens, channels] as they enter the language model."""
    wanted = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    wanted += ("image_position_ids", "spatial_shapes", "target_sizes")
    with torch.no_grad():
        out = model.get_image_features(**{k: inputs[k] for k in wanted if k in inputs})
    out = out.pooler_output if hasattr(out, "pooler_output") else out
    if isinstance(out, (list, tuple)):
        out = torch.cat(list(out))
    return out.reshape(-1, out.shape[-1])


@cache
def built(family: str) -> Built:
    torch.manual_seed(0)
    model, processor, config = FAMILIES[family]()
    for weight in model.eval().parameters():
        if not weight.any():  # Gemma 3 starts its projection at zero
            torch.nn.init.normal_(weight, std=0.02)
    return model, processor, config


@pytest.mark.parametrize("size", [(200, 120), (90, 170), (64, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("spot", [(0.3, 0.4), (0.7, 0.6), (0.6, 0.25)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_region_is_found_again(
    family: str, size: tuple[int, int], spot: tuple[float, float]
) -> None:
    model, processor, config = built(family)
    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    plain = Image.fromarray(noise // 8 + 100)
    marked = plain.copy()
    # A region the size of a coarse cell, around the spot.
    half = 0.08
    left, right = int((spot[0] - half) * width), int((spot[0] + half) * width)
    top, bottom = int((spot[1] - half) * height), int((spot[1] + half) * height)
    marked.paste((255, 255, 255), (left, top, right, bottom))

    before, after = (
        dict(processor.image_processor([[image]], return_tensors="pt")) for image in (plain, marked)
    )
    change = (_features(model, after) - _features(model, before)).norm(dim=-1)  # [tokens]
    inputs = {**before, "input_ids": torch.full((1, len(change)), 5)}
    boxes = token_boxes(config, processor, inputs, [plain])
    assert len(boxes) == len(change)
    # Attention spreads a little of the change everywhere: what stands out must be the region.
    weights = (change - change.median()).clamp(min=0)
    heat = heat_map(weights / weights.sum(), boxes, 0, size)
    y, x = (axis.mean() for axis in np.nonzero(heat > 0.5 * heat.max()))
    reach = 0.14  # half of a coarse cell and a little
    assert abs(x / width - spot[0]) < reach and abs(y / height - spot[1]) < reach
    near = heat[
        int(max(0, spot[1] - 0.25) * height) : int((spot[1] + 0.25) * height),
        int(max(0, spot[0] - 0.25) * width) : int((spot[0] + 0.25) * width),
    ]
    assert near.sum() > 0.6 * heat.sum()


def test_mass_is_kept_and_tiles_add_up() -> None:
    """A coarse and a fine grid over one picture: the density is the sum of both."""
    coarse, fine = grid_boxes(1, 1), grid_boxes(2, 2)
    boxes = {i: (0, box) for i, box in enumerate([*coarse, *fine])}
    boxes[5] = (0, None)
    heat = heat_map(torch.tensor([0.2, 0.8, 0.0, 0.0, 0.0, 9.0]), boxes, 0, (10, 10))
    assert heat.mean() == pytest.approx(1.0)
    assert heat[2, 2] == pytest.approx(0.2 + 0.8 * 4) and heat[7, 7] == pytest.approx(0.2)
    assert heat_map(torch.ones(6), boxes, 1, (10, 10)).sum() == 0


def test_what_cannot_be_mapped_is_said() -> None:
    config = SimpleNamespace(model_type="mystery", image_token_id=5)
    with pytest.raises(UserError, match="'mystery' are not supported; known types: .*qwen2_vl"):
        token_boxes(config, None, {"input_ids": [[5]]}, [])
    _, processor, llava = _llava(crop=False)
    with pytest.raises(UserError, match="3 tokens, but 64 places"):
        token_boxes(llava, processor, {"input_ids": [[5, 5, 5]]}, [Image.new("RGB", (9, 9))])
