"""InternVL2 as published (internvl_chat with InternLM2) -> the InternVL port of transformers.

Tensor by tensor, from names and shapes alone: nothing of the repository's Python is run. InternLM2
is a Llama whose q, k and v are one matrix, interleaved by key/value head; the vision tower has its
q, k and v in one matrix too. Not converted: video, which InternVL2's own code treats differently.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.offline.disk import number_shards, save_shards
from qig_serve.offline.source.sentencepiece_tokenizer import build
from qig_serve.offline.source.tensors import SourceCheckpoint, check_values

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
# As InternVL2's conversation.py joins turns ("internlm2-chat"): no line break after <|im_end|>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + _SYSTEM
    + "<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] in ['image', 'image_url'] %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DECODER = "language_model.model."
_TOWER = "vision_tower."
_PLACES = {
    "BLOCK": (r"language_model.model.layers.(\d+)", r"language_model.model.layers.\1"),
    "LAYER": (r"vision_model.encoder.layers.(\d+)", r"vision_tower.encoder.layer.\1"),
    "EMBEDDINGS": ("vision_model.embeddings", "vision_tower.embeddings"),
}
# Name in the source, name in the port; what is not here nor split below is refused.
_TABLE = r"""
language_model.model.tok_embeddings.weight   language_model.model.embed_tokens.weight
language_model.model.norm.weight             language_model.model.norm.weight
language_model.output.weight                 language_model.lm_head.weight
BLOCK.attention.wo.(weight|bias)             BLOCK.self_attn.o_proj.\2
BLOCK.feed_forward.w1.weight                 BLOCK.mlp.gate_proj.weight
BLOCK.feed_forward.w3.weight                 BLOCK.mlp.up_proj.weight
BLOCK.feed_forward.w2.weight                 BLOCK.mlp.down_proj.weight
BLOCK.attention_norm.weight                  BLOCK.input_layernorm.weight
BLOCK.ffn_norm.weight                        BLOCK.post_attention_layernorm.weight
EMBEDDINGS.class_embedding                   EMBEDDINGS.cls_token
EMBEDDINGS.position_embedding                EMBEDDINGS.position_embeddings
EMBEDDINGS.patch_embedding.(weight|bias)     EMBEDDINGS.patch_embeddings.projection.\1
LAYER.attn.proj.(weight|bias)                LAYER.attention.projection_layer.\2
LAYER.attn.([qk])_norm.weight                LAYER.attention.\2_norm.weight
LAYER.ls([12])                               LAYER.lambda_\2
LAYER.mlp.(fc[12]).(weight|bias)             LAYER.mlp.\2.\3
LAYER.norm1.(weight|bias)                    LAYER.layernorm_before.\2
LAYER.norm2.(weight|bias)                    LAYER.layernorm_after.\2
mlp1.0.(weight|bias)                         multi_modal_projector.layer_norm.\1
mlp1.1.(weight|bias)                         multi_modal_projector.linear_1.\1
mlp1.3.(weight|bias)                         multi_modal_projector.linear_2.\1
"""


def _renames() -> Iterator[tuple[re.Pattern[str], str]]:
    """(pattern of source names, name in the port) of each line of the table."""
    for line in _TABLE.strip().splitlines():
        source, target = line.split()
        for place, (old, new) in _PLACES.items():
            source, target = source.replace(place, old), target.replace(place, new)
        yield re.compile(source.replace(".", r"\.") + "$"), target


_RENAMES = tuple(_renames())
_WQKV = re.compile(r"language_model\.model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)$")
_VISION_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
_DECODER_FIELDS = (
    "vocab_size",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "hidden_act",
)


def convert_tensor(
    name: str, tensor: torch.Tensor, heads: int, kv_heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs of the port that one source tensor becomes.

    wqkv [(heads + 2 kv_heads) * D, C]: for every key/value head its query heads, its key, its
    value. The tower's qkv [3 C, C]: all queries, all keys, all values. UserError for other names.
    """
    if match := _WQKV.match(name):
        groups = heads // kv_heads
        split = tensor.unflatten(0, (kv_heads, groups + 2, -1))
        parts = (split[:, :groups], split[:, groups], split[:, groups + 1])
        for letter, part in zip("qkv", parts, strict=True):
            target = f"{_DECODER}layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"
            yield target, part.reshape(-1, *tensor.shape[1:]).contiguous()
        return
    if match := _VISION_QKV.match(name):
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            target = f"{_TOWER}encoder.layer.{match[1]}.attention.{letter}_proj.{match[2]}"
            yield target, part.contiguous()
        return
    for pattern, target in _RENAMES:
        if pattern.match(name):
            yield pattern.sub(target, name), tensor
            return
    raise UserError(f"tensor {name} belongs to no InternVL2 model that can be converted")


def convert_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json of the port, without token ids; UserError for other models."""
    if config.get("model_type") != "internvl_chat":
        raise UserError(
            f"{where}: model_type {config.get('model_type')!r}: only internvl_chat checkpoints "
            "(InternVL2 as published) are converted"
        )
    llm, vision = config.get("llm_config", {}), config.get("vision_config", {})
    if "InternLM2ForCausalLM" not in llm.get("architectures", []):
        raise UserError(
            f"{where}: the decoder is {llm.get('architectures')}, and only InternLM2 decoders "
            "(InternVL2-2B, 8B, 26B) are converted"
        )
    if config.get("ps_version", "v2") != "v2":
        raise UserError(f"{where}: pixel shuffle {config['ps_version']!r} is not that of the port")
    ratio = float(config.get("downsample_ratio", 0.5))
    size, patch = int(config.get("force_image_size") or vision["image_size"]), vision["patch_size"]
    text = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bool(llm.get("bias", False)),
        "mlp_bias": False,
        **{key: llm[key] for key in (*_SIZES, *_DECODER_FIELDS)},
        "tie_word_embeddings": bool(llm.get("tie_word_embeddings", False)),
    }
    if scaling := llm.get("rope_scaling"):
        text["rope_scaling"] = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "dtype": config.get("torch_dtype", "bfloat16"),
        "downsample_ratio": ratio,
        "image_seq_length": int((size // patch * ratio) ** 2),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": int(config.get("select_layer", -1)),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision",
            "image_size": [size, size],
            "patch_size": [patch, patch],
            "attention_bias": bool(vision.get("qkv_bias", True)),
            "use_qk_norm": bool(vision.get("qk_normalization", False)),
            "norm_type": vision.get("norm_type", "layer_norm"),
            "hidden_act": vision.get("hidden_act", "gelu"),
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            **{key: vision[key] for key in _SIZES},
        },
    }


def convert_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of `tokenizer.model` and added_tokens.json; UserError without them."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if not (directory / "tokenizer.model").is_file():
        raise UserError(f"{directory} has no tokenizer.model")
    tokenizer = build(directory / "tokenizer.model")
    added: dict[str, int] = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        try:
            added = {str(k): int(v) for k, v in json.loads(path.read_text("utf-8")).items()}
        except (ValueError, AttributeError, TypeError):
            raise UserError(f"{path} is not a table of tokens and ids") from None
    for token, number in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{path}: {token} has id {number}, which does not follow the others")
    known = tokenizer.get_vocab()
    missing = [t for t in (CONTEXT, START, END, "<|im_start|>", "<|im_end|>") if t not in known]
    if missing:
        raise UserError(f"{directory}: the tokenizer has no token {missing[0]}")
    # The port's processor must know a video token. One that no text holds, so nothing is a video.
    unused = [t for t in known if t.startswith("[UNUSED_TOKEN_")]
    video = "<video>" if "<video>" in known else max(unused, default="<quad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens={
            "context_image_token": CONTEXT,
            "start_image_token": START,
            "end_image_token": END,
            "video_token": video,
        },
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def convert(
    source_dir: Path | str,
    output: Path | str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Rewrite a published InternVL2 directory; the new directory.

    `progress` is called with what is being done, the number of tensors done, and of all.
    One shard in memory at a time, written beside `output` and renamed at the end. UserError when
    the source is no such model or the output exists; nothing is left behind then.
    """
    source_dir, output = Path(source_dir), Path(output)
    path = source_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{source_dir} is not a model directory: it has no config.json")
    if output.exists():
        raise UserError(f"{output} exists already: choose another directory, or remove it")
    try:
        original = json.loads(path.read_text(encoding="utf-8"))
        config = convert_config(original, str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an InternVL2 configuration: {error}") from None
    source = SourceCheckpoint(source_dir)
    tokenizer = convert_tokenizer(source_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        tensors = _converted(source, config["text_config"], progress)
        number_shards(save_shards(tensors, partial, "part"))
        _write_configs(partial, config, original, tokenizer)
        for name in ("LICENSE", "README.md"):
            if (source_dir / name).is_file():
                shutil.copyfile(source_dir / name, partial / name)
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        source.close()
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _converted(
    source: SourceCheckpoint,
    text: dict[str, Any],
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The port's tensors, by name, one source tensor after another."""
    names = list(source)
    for done, name in enumerate(names, start=1):
        if progress is not None:
            progress("converting", done, len(names))
        tensor = source.tensor(name)
        check_values(tensor, tensor.dtype, f"{name} in {source.directory}")
        yield from convert_tensor(
            name, tensor, text["num_attention_heads"], text["num_key_value_heads"]
        )


def _write_configs(
    directory: Path, config: dict[str, Any], original: dict[str, Any], tokenizer: Any
) -> None:
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in (CONTEXT, "<|im_start|>", "<|im_end|>")}
    # InternVL2 stops at each of these.
    eos = [ids["<|im_end|>"], tokenizer.convert_tokens_to_ids("</s>"), ids["<|im_start|>"]]
    config = {**config, "image_token_id": ids[CONTEXT]}
    config["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    generation["pad_token_id"] = tokenizer.pad_token_id
    side = config["vision_config"]["image_size"][0]
    images = {
        "crop_to_patches": bool(original.get("dynamic_image_size", True)),
        "min_patches": int(original.get("min_dynamic_patch", 1)),
        "max_patches": int(original.get("max_dynamic_patch", 12)),
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "do_convert_rgb": True,
    }
    videos = {k: v for k, v in images.items() if not k.endswith("_patches")}
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config["image_seq_length"],
        "image_processor": {"image_processor_type": "GotOcr2ImageProcessor", **images},
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", **videos},
    }
    tokenizer.save_pretrained(directory)
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("processor_config.json", processor),
    ):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    tokenizer_config["processor_class"] = "InternVLProcessor"
    (directory / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
