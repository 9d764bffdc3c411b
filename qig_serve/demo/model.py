"""The demonstration models as data, and how one is built: configuration, processor, weights.

A specification is a row of MODELS. Everything it builds is a plain Hugging Face model and
processor, so that whatever reads published checkpoints of the family reads these too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qig_serve.demo.pictures import CELL, IMAGE_SIZE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
PREFIX = "<|im_start|>user\n<image>"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

CHAT_TEMPLATE = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] in ['image', 'image_url'] %}{{ '<image>' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a demonstration model. All decoder sizes are multiples of 128."""

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_heads: int
    vision_layers: int
    vision_intermediate: int
    vocab_size: int = 768
    max_positions: int = 1024
    # The embedding of <|im_start|> holds one channel this large (other channels are near 0.05),
    # so that the first token is the massive activation that large models grow by themselves.
    sink_channel: int = 17
    sink_value: float = 20.0
    seed: int = 20


MODELS: dict[str, ModelSpec] = {
    "llava": ModelSpec(
        name="llava",
        family="llava",
        hidden=256,
        intermediate=768,
        layers=4,
        heads=4,
        kv_heads=2,
        vision_hidden=192,
        vision_heads=3,
        vision_layers=4,
        vision_intermediate=768,
    ),
}


def get_spec(name: str) -> ModelSpec:
    """Looks a specification up by name."""
    if name not in MODELS:
        raise ValueError(f"unknown demonstration model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with chat tokens; any text can be tokenized."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<image>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(spec: ModelSpec, tokenizer: Any) -> Any:
    """The family's processor: an image becomes (IMAGE_SIZE / CELL)^2 image tokens."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """The Hugging Face configuration of a specification."""
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    if spec.family != "llava":
        raise ValueError(f"no configuration for family {spec.family!r}")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=spec.vision_hidden,
            intermediate_size=spec.vision_intermediate,
            num_hidden_layers=spec.vision_layers,
            num_attention_heads=spec.vision_heads,
            image_size=IMAGE_SIZE,
            patch_size=CELL,
            projection_dim=spec.vision_hidden,
        ),
        text_config=Qwen2Config(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden,
            intermediate_size=spec.intermediate,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            max_position_embeddings=spec.max_positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=pad,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // CELL) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        eos_token_id=end,
        pad_token_id=pad,
    )


def make_model(spec: ModelSpec, tokenizer: Any) -> Any:
    """A freshly initialized float32 model with the massive channel in place."""
    import torch
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    torch.manual_seed(spec.seed)
    config = make_config(spec, tokenizer)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        table = model.get_input_embeddings().weight  # [vocab, hidden]
        table.normal_(std=0.05)
        table[tokenizer.convert_tokens_to_ids("<|im_start|>"), spec.sink_channel] = spec.sink_value
        # Depth-scaled residual writers keep the stream's size even over the layers.
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * spec.layers) ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# transformers 5 nests modules otherwise than the files it publishes; readers of LLaVA
# checkpoints, vLLM among them, go by the published names.
_PUBLISHED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def published_name(name: str) -> str:
    """The name a LLaVA checkpoint file has for a parameter of the transformers 5 module."""
    for ours, theirs in _PUBLISHED:
        if name.startswith(ours):
            rest = name.removeprefix(ours).removeprefix("vision_model.")
            return theirs + rest
    raise ValueError(f"no published name for {name!r}")


def save_model(model: Any, processor: Any, directory: Path | str) -> None:
    """Writes a bf16 Hugging Face directory: weights, configuration, processor, chat template."""
    import torch
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        published_name(name): tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    processor.save_pretrained(directory)
    _edit_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model.generation_config.save_pretrained(directory)
    model.config.save_pretrained(directory)
    architecture = type(model).__name__
    _edit_json(directory / "config.json", dtype="bfloat16", architectures=[architecture])
    # Readers older than transformers 5 look for the image processor in a file of its own.
    images = json.loads((directory / "processor_config.json").read_text("utf-8"))
    (directory / "preprocessor_config.json").write_text("{}", "utf-8")
    _edit_json(directory / "preprocessor_config.json", **images["image_processor"])


def _edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def load_model(directory: Path | str, dtype: Any = None) -> tuple[Any, Any]:
    """(model, processor) of a directory, offline."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype or torch.bfloat16, local_files_only=True
    )
    return model.eval(), processor
