"""InternVL2 as published (internvl_chat with InternLM2) -> the InternVL port of transformers.

Tensor by tensor, from names and shapes alone: nothing of the repository's Python is run. InternLM2
is a Llama whose q, k and v are one matrix, interleaved by key/value head; the vision tower has its
q, k and v in one matrix too. Not converted: video, which InternVL2's own code treats differently.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.model_directory import (
    CONFIG_FILE,
    find_model,
    model_dtype,
    read_config,
    read_json,
)
from qig_serve.offline.disk import disk_errors, number_shards, save_shards
from qig_serve.offline.source.decoder_config import check_block_count
from qig_serve.offline.source.internvl2_tensors import check_tensors, convert_tensor
from qig_serve.offline.source.sentencepiece_tokenizer import build
from qig_serve.offline.source.tensors import SourceCheckpoint, check_values
from qig_serve.weight_files import check_full_precision

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

_TEMPLATE = "internlm2-chat"
"""The name that config.json of InternVL 1.5 and InternVL2 gives to CHAT_TEMPLATE."""
_COPY_AGAIN = "copy the published model's file there again"

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
_DECODER_FIELDS = (
    "vocab_size",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "hidden_act",
)


def convert_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json of the port, without token ids and dtype; UserError for other models."""
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
    if config.get("template") != _TEMPLATE:
        raise UserError(
            f"{where}: template {config.get('template')!r}: prompts are written for that of "
            f"InternVL2, {_TEMPLATE!r}; for InternVL 2.5 and later give the model in the form of "
            "transformers (names that end in -hf)"
        )
    if config.get("dynamic_image_size") and config.get("use_thumbnail") is False:
        raise UserError(
            f"{where}: use_thumbnail is false, and the port adds a thumbnail to every picture "
            "that it cuts: only models trained with thumbnails are converted"
        )
    ratio = float(config.get("downsample_ratio", 0.5))
    size, patch = int(config.get("force_image_size") or vision["image_size"]), vision["patch_size"]
    tokens = size / patch * ratio  # along a side
    if tokens < 1 or tokens % 1:
        raise UserError(
            f"{where}: a picture of {size} pixels in patches of {patch}, shrunk by {ratio}, has no "
            f"whole number of tokens: {_COPY_AGAIN}"
        )
    layer = int(config.get("select_layer", -1))
    if abs(layer) > vision["num_hidden_layers"]:
        raise UserError(
            f"{where}: select_layer is {layer}, and the vision tower has "
            f"{vision['num_hidden_layers']} layers: {_COPY_AGAIN}"
        )
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
        "downsample_ratio": ratio,
        "image_seq_length": int(tokens**2),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
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
        raise UserError(f"{directory} has no tokenizer.model: {_COPY_AGAIN}")
    tokenizer = build(directory / "tokenizer.model")
    added: dict[str, int] = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        added = read_json(path)
        if not all(type(number) is int for number in added.values()):
            raise UserError(f"{path} is not a table of tokens and ids: {_COPY_AGAIN}")
    for token, number in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{path}: {token} has id {number}, which does not follow the others: {_COPY_AGAIN}"
            )
    known = tokenizer.get_vocab()
    missing = [t for t in (CONTEXT, START, END, "<|im_start|>", "<|im_end|>") if t not in known]
    if missing:
        raise UserError(
            f"{directory}: the tokenizer has no token {missing[0]}, of tokenizer.model and "
            f"added_tokens.json: {_COPY_AGAIN}"
        )
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
    """Rewrite a published InternVL2 model (a directory, or org/name); the new directory.

    `progress` is called with what is being done, the number of tensors done, and of all.
    One shard in memory at a time, written beside `output` and renamed at the end. UserError when
    the source is no such model or the output exists; nothing is left behind then.
    """
    source_dir, output = find_model(source_dir), Path(output)
    original = read_config(source_dir)
    if os.path.lexists(output):
        raise UserError(f"{output} exists already: choose another directory, or remove it")
    path = source_dir / CONFIG_FILE
    try:
        config = convert_config(original, str(path))
        images = _image_settings(original, config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} cannot be read as an InternVL2 configuration ({type(error).__name__}: "
            f"{error}): {_COPY_AGAIN}"
        ) from None
    check_block_count(config, path)
    config["dtype"] = str(model_dtype(source_dir)).removeprefix("torch.")
    check_full_precision(source_dir)
    source = SourceCheckpoint(source_dir)
    try:
        source.check_full_precision()
        check_tensors(source, config)
        tokenizer = convert_tokenizer(source_dir)
        if len(tokenizer) > (rows := config["text_config"]["vocab_size"]):
            raise UserError(
                f"{source_dir}: its tokenizer has {len(tokenizer)} tokens, and its embedding only "
                f"{rows} rows: {_COPY_AGAIN} (tokenizer.model, added_tokens.json)"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            with disk_errors(output):
                tensors = _converted(source, config["text_config"], progress)
                number_shards(save_shards(tensors, partial, "part"))
                _write_configs(partial, config, images, tokenizer)
                for name in ("LICENSE", "README.md"):
                    if (source_dir / name).is_file():
                        shutil.copyfile(source_dir / name, partial / name)
                partial.chmod(0o755)
                partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        source.close()
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


def _image_settings(original: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Those of the port's image processor, from the published config.json and the port's."""
    side = config["vision_config"]["image_size"][0]
    fewest = int(original.get("min_dynamic_patch", 1))
    most = int(original.get("max_dynamic_patch", 12))
    if not 1 <= fewest <= most:
        raise ValueError(f"min_dynamic_patch is {fewest} and max_dynamic_patch {most}")
    return {
        "crop_to_patches": bool(original.get("dynamic_image_size", True)),
        "min_patches": fewest,
        "max_patches": most,
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


def _write_configs(
    directory: Path, config: dict[str, Any], images: dict[str, Any], tokenizer: Any
) -> None:
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in (CONTEXT, "<|im_start|>", "<|im_end|>")}
    # InternVL2 stops at each of these.
    eos = [ids["<|im_end|>"], tokenizer.convert_tokens_to_ids("</s>"), ids["<|im_start|>"]]
    config = {**config, "image_token_id": ids[CONTEXT]}
    config["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    generation["pad_token_id"] = tokenizer.pad_token_id
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
