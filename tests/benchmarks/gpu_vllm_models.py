"""Random-weight models at real sizes, as checkpoints of every variant that vLLM is timed with.

    make_checkpoints("qwen2-vl-7b", ["bf16", "w3a16"], directory, device="cuda")

Nothing is downloaded and no calibration runs: weights are drawn from a seed a layer, and every
quantized variant is those same weights rounded to nearest by the package's own packing. What all
variants share (vision tower, embeddings, lm_head, norms) lies in one file that they link to.
`tiny=True` makes the same models with few and narrow layers, for a machine without a GPU.

Tokenizer: a word a token and as many words as the model has embeddings, so that text made from
random tokens, as `vllm bench` makes it, has as many tokens again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qig_serve import packing
from qig_serve.formats import FORMAT_VERSION, QuantScheme, get_scheme
from qig_serve.offline import compressed_tensors
from qig_serve.offline.architectures import get_architecture

sys.path.insert(0, str(Path(__file__).parents[1] / "offline"))
import tiny_models
from tiny_models import HALF, Tiny

STD = 0.02
DONE = ".complete"
LINEARS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class BenchModel:
    """How a model is made: its configuration, its processor, and the pictures it is shown."""

    family: str
    """Row of offline/architectures.py and of the tiny models."""
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


def _text(tokenizer: Any, tiny: bool, **real: Any) -> dict[str, Any]:
    sizes = tiny_models._text(tokenizer)
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
        rope = tiny_models._MROPE
    text = _text(tokenizer, tiny, **_QWEN2_7B)
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
    if tiny:
        vision = {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(
        vision_config={**vision, "hidden_size": text["hidden_size"], "patch_size": 14},
        text_config={**text, "rope_parameters": rope},
        **tiny_models._qwen_ids(tokenizer),
        **tiny_models._common(tokenizer),
    )


def _qwen2_vl_processor(tokenizer: Any, template: str, tiny: bool) -> Any:
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # At most 1,280 tokens a picture, as the model card recommends.
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
            **(tiny_models._VISION if tiny else vision),
            image_size=side,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**_text(tokenizer, tiny, **_QWEN2_7B)),
        image_token_index=tiny_models._id(tokenizer, "<image>"),
        video_token_index=tiny_models._id(tokenizer, "<video>"),
        image_grid_pinpoints=_onevision_pinpoints(side, 2 if tiny else 6),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4" if tiny else "anyres_max_9",
        **tiny_models._common(tokenizer),
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

    text = _text(
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
            **(tiny_models._VISION if tiny else vision), image_size=[side] * 2, patch_size=[14, 14]
        ),
        text_config=LlamaConfig(**text),
        image_token_id=tiny_models._id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4 if tiny else 256,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        **tiny_models._common(tokenizer),
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

_W4A16 = QuantScheme("w4a16", bits=4, symmetric=True, group_size=128, servable=False)
_W3A16_SYMMETRIC = QuantScheme(
    "w3a16-symmetric", bits=3, symmetric=True, group_size=128, servable=False
)
CHECKPOINTS: dict[str, QuantScheme | None] = {
    "bf16": None,
    "w3a16": get_scheme("w3a16"),
    "w4a8": get_scheme("w4a8"),
    # compressed-tensors: what `quantize --format compressed-tensors` writes of the two above ...
    "ct-w3a16": get_scheme("w3a16"),
    "ct-w4a8": get_scheme("w4a8"),
    # ... one bit more, for Marlin and Machete; and 3 bits without gaps, for Humming, which vLLM
    # takes without zero points alone.
    "ct-w4a16": _W4A16,
    "ct-w3a16-dense": _W3A16_SYMMETRIC,
}
"""What is written -> how its linears are stored; None: not quantized."""


def make_tokenizer(model: BenchModel, tiny: bool) -> Any:
    """A word a token; the special tokens of the family and as many words as fill the model."""
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


def _draw(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """bf16 weights of a tensor: the same for the same name, whatever else is made."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * STD
    return values + 1 if "norm" in name and name.endswith("weight") else values


def _packed(
    weight: torch.Tensor, kind: str, scheme: QuantScheme
) -> dict[str, torch.Tensor]:  # suffix -> tensor
    """The weight [N, K] rounded to nearest, as the checkpoint of this kind stores it."""
    dtype = packing.scale_dtype(scheme, weight.dtype)
    scale, zero = packing.minmax_params(weight, scheme, dtype)
    codes = packing.quantize(weight, scale, zero, scheme)
    if kind == "ct-w3a16-dense":
        unsigned = (codes.to(torch.int16) + (1 << (scheme.bits - 1))).to(torch.uint8)
        return {
            "weight_packed": packing.pack(unsigned, scheme.bits),
            "weight_scale": scale.to(dtype),
            "weight_shape": torch.tensor(list(weight.shape)),
        }
    stored = packing.pack_linear(codes, scale, zero, scheme, weight.dtype)
    return compressed_tensors.convert_linear(stored, scheme) if kind.startswith("ct-") else stored


def _left_alone(names: Iterable[str], prefix: str) -> list[str]:
    """Shortest names that cover all tensors but the decoder's blocks under `prefix`."""
    inside = {prefix[: i + 1] for i, c in enumerate(prefix) if c == "."}
    found = set()
    for name in names:
        if name.startswith(prefix):
            continue
        cut = name.find(".")
        while cut >= 0 and name[: cut + 1] in inside:
            cut = name.find(".", cut + 1)
        found.add(name if cut < 0 else name[:cut])
    return sorted(found)


def quantization_config(
    model: BenchModel, kind: str, config: Any, left_alone: Sequence[str]
) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None in full precision."""
    scheme = CHECKPOINTS[kind]
    if scheme is None:
        return None
    if kind.startswith("ct-"):
        arch = get_architecture(model.family)
        found = compressed_tensors.quantization_config(arch, scheme, left_alone)
        found["config_groups"]["group_0"]["weights"]["num_bits"] = (
            3 if kind == "ct-w3a16-dense" else 4
        )
        return found
    return {
        "quant_method": "qig", "format_version": FORMAT_VERSION, "scheme": scheme.name,
        "bits": scheme.bits, "group_size": scheme.group_size, "ignore": list(left_alone),
        "model_type": config.model_type, "architectures": config.architectures, "method": "rtn",
        "produced_by": "random weights, for timing",
    }  # fmt: skip


def make_checkpoints(
    name: str, kinds: Sequence[str], directory: Path, device: str = "cpu", tiny: bool = False,
    layers: int | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Kind -> its checkpoint under `directory`; those that are complete are left as they are.

    `layers` overrides the number of decoder blocks (to try real widths on a small machine).
    """
    model = MODELS[name]
    targets = {kind: directory / f"{name}{'-tiny' if tiny else ''}" / kind for kind in kinds}
    wanted = {k: path for k, path in targets.items() if not (path / DONE).exists()}
    if not wanted:
        return targets
    tokenizer = make_tokenizer(model, tiny)
    config = model.config(tokenizer, tiny)
    config.dtype = "bfloat16"
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
    everything = shapes(model, config)
    prefix = next(
        p for p in get_architecture(model.family).source_prefixes
        if any(n.startswith(p) for n in everything)
    )  # fmt: skip
    in_layers = [n for n in everything if n.startswith(prefix)]
    left_alone = _left_alone(everything, prefix)
    for kind, path in wanted.items():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        config.save_pretrained(path)
        written = json.loads((path / "config.json").read_text())
        quantization = quantization_config(model, kind, config, left_alone)
        if quantization is not None:
            written["quantization_config"] = quantization
        (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        template = tiny_models.chat_template(model.row.image_text)
        model.processor(tokenizer, template, tiny).save_pretrained(path)
        tokenizer.save_pretrained(path)

    outside = [n for n in everything if n not in in_layers]
    shared = directory / f"{name}{'-tiny' if tiny else ''}" / "rest.safetensors"
    if not shared.exists():  # others may link to it
        rest = {n: _draw(n, everything[n], device).cpu() for n in outside}
        save_file(rest, shared.with_suffix(".tmp"), {"format": "pt"})
        shared.with_suffix(".tmp").rename(shared)
        del rest
    for path in wanted.values():
        os.link(shared, path / shared.name)
    index = {kind: dict.fromkeys(outside, shared.name) for kind in wanted}
    for layer in range(config.text_config.num_hidden_layers):
        file = f"layer-{layer:03d}.safetensors"
        names = [n for n in in_layers if n.startswith(f"{prefix}{layer}.")]
        weights = {n: _draw(n, everything[n], device) for n in names}
        for kind, path in wanted.items():
            tensors = _layer(weights, kind)
            save_file(tensors, path / file, {"format": "pt"})
            index[kind] |= dict.fromkeys(tensors, file)
    for kind, path in wanted.items():
        contents = {"metadata": {}, "weight_map": index[kind]}
        (path / "model.safetensors.index.json").write_text(json.dumps(contents) + "\n")
        (path / DONE).touch()
    if device == "cuda":
        torch.cuda.empty_cache()  # an engine is next to want the memory
    return targets


def _layer(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A decoder block's tensors as a checkpoint of the kind stores them, on the CPU."""
    scheme = CHECKPOINTS[kind]
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        linear = name.removesuffix(".weight")
        if scheme is None or not linear.endswith(LINEARS) or tensor.dim() != 2:
            stored[name] = tensor.cpu()
        else:
            packed = _packed(tensor, kind, scheme)
            stored |= {f"{linear}.{s}": t.cpu().contiguous() for s, t in packed.items()}
    return stored


def weight_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
