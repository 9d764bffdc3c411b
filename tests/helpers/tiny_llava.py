"""A tiny LLaVA with random weights, quantized by rounding, and Hugging Face's run of the same.

Published LLaVA checkpoints name their tensors `language_model.model.…`; transformers 5 does not
save them so, hence the renaming.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qig_serve import packing
from qig_serve.formats import FORMAT_VERSION, VOCABULARY_SCHEME, QuantScheme, get_scheme

IMAGE, EOS, PAD = 257, 256, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(directory: Path, layers: int = 2, seed: int = 0, decoder: str = "Qwen2Config") -> Path:
    """Write the full-precision model (bf16) to `directory`.

    decoder: transformers' class of the decoder's configuration.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<image>", "<pad>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    size = {"height": 56, "width": 56}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        text_config=getattr(transformers, decoder)(
            vocab_size=384,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.04,
            tie_word_embeddings=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            projection_dim=128,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="bfloat16",
    )
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # or a lost bias would not show
                parameter.normal_(std=0.1)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {_published_name(name): tensor for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    return directory


def _published_name(name: str) -> str:
    name = name.removeprefix("model.").replace("language_model.model.", "language_model.")
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    if name.startswith("vision_tower.") and "vision_model" not in name:
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model.") and "lm_head" not in name:
        return name.replace("language_model.", "language_model.model.", 1)
    return name


VOCABULARY = ("language_model.lm_head", "language_model.model.embed_tokens")


def quantize(source: Path, directory: Path, scheme_name: str, vocabulary_bits: int = 16) -> Path:
    """Write a qig checkpoint of `source`, rounded to nearest, to `directory`.

    vocabulary_bits: of output head and embedding, 16 or 8.
    """
    eight_bit = list(VOCABULARY) if vocabulary_bits == 8 else []
    scheme = get_scheme(scheme_name)
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in eight_bit:
            packed = packing.pack_rows(tensor, VOCABULARY_SCHEME)
            written |= {f"{module}.{key}": t for key, t in packed.items()}
            continue
        if not is_quantized(name):
            written[name] = tensor
            continue
        scale, zero = packing.minmax_params(
            tensor, scheme, packing.scale_dtype(scheme, tensor.dtype)
        )
        codes = packing.quantize(tensor, scale, zero, scheme)
        packed = packing.pack_linear(codes, scale, zero, scheme, tensor.dtype)
        written |= {f"{name.removesuffix('.weight')}.{key}": t for key, t in packed.items()}
    save_file(written, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "qig",
        "format_version": FORMAT_VERSION,
        "scheme": scheme_name,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "ignore": [
            "vision_tower",
            "multi_modal_projector",
            *(name for name in VOCABULARY if name not in eight_bit),
            "language_model.model.norm",
        ],
        "method": "rtn",
    }
    if eight_bit:
        config["quantization_config"]["eight_bit"] = eight_bit
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def is_quantized(name: str) -> bool:
    return name.startswith("language_model.") and name.endswith(
        tuple(f"{linear}.weight" for linear in LINEARS)
    )


def reference(source: Path, checkpoint: Path, dtype: torch.dtype) -> Any:
    """Hugging Face's model of `source` with the checkpoint's dequantized weights.

    For w4a8 the inputs of the decoder's linears are quantized to int8 and back.
    """
    from transformers import LlavaForConditionalGeneration

    scheme: QuantScheme = get_scheme(
        json.loads((checkpoint / "config.json").read_text())["quantization_config"]["scheme"]
    )
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype).eval()
    tensors = load_file(checkpoint / "model.safetensors")

    def parts(module: str) -> dict[str, torch.Tensor]:
        start = f"{module}."
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    tables = (model.lm_head, model.model.language_model.embed_tokens)
    for name, table in zip(VOCABULARY, tables, strict=True):
        if "weight_packed" in (stored := parts(name)):
            table.weight.data.copy_(packing.unpack_rows(stored, VOCABULARY_SCHEME, dtype))
    for name, module in model.model.language_model.named_modules():
        if not name.endswith(LINEARS):
            continue
        stored = parts(f"language_model.model.{name}")
        module.weight.data.copy_(packing.unpack_linear(stored, scheme))
        if scheme.activation_bits:
            module.register_forward_pre_hook(
                lambda _, args: (packing.fake_quantize_activation(args[0]),)
            )
    return model


def picture(seed: int = 0, size: int = 60) -> Image.Image:
    """Blobs of colour."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (6, 6, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((size, size), Image.Resampling.NEAREST)


def data_url(image: Image.Image) -> str:
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def conversation(question: str, image: Image.Image) -> list[dict[str, Any]]:
    """One user turn in OpenAI form."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]
