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

from qig_serve.demo.families import get_family
from qig_serve.demo.family_row import Family

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

_CHAT_TEMPLATE = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] in ['image', 'image_url'] %}{{ 'IMAGE' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chat_template(family: Family) -> str:
    """The Qwen-style chat template, with the family's text for an image."""
    return _CHAT_TEMPLATE.replace("IMAGE", family.image_text)


def question_prefix(family: Family) -> str:
    """What stands before a question about one picture, with one image token."""
    before, after = family.image_frame
    return f"<|im_start|>user\n{before}{family.image_token}{after}"


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a demonstration model. All decoder sizes are multiples of 128."""

    name: str
    family: str
    layers: int
    seed: int
    hidden: int = 256
    intermediate: int = 384
    heads: int = 4
    kv_heads: int = 2
    vision_hidden: int = 192
    vision_heads: int = 3
    vision_layers: int = 2
    vision_intermediate: int = 768
    experts: int = 0
    """Experts of a block, each with an MLP of `intermediate`; 0: one MLP."""
    experts_per_token: int = 0
    trained: bool = True
    """Whether a trained one is in the repository."""
    vocab_size: int = 768
    max_positions: int = 1024
    # The embedding of <|im_start|> holds one channel this large (other channels are near 0.05),
    # so that the first token is the massive activation that large models grow by themselves.
    sink_channel: int = 17
    sink_value: float = 20.0


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("llava", "llava", layers=4, seed=20, intermediate=768, vision_layers=4),
        # Twice as deep, with M-RoPE and four patches to an image token.
        ModelSpec("qwen2-vl", "qwen2_vl", layers=8, seed=21),
        # A shallower tower with layer scale and pixel shuffle, and a narrower MLP.
        ModelSpec("internvl", "internvl", layers=4, seed=22),
        # Eight experts, of which a token asks two. Not bundled: `demo train` makes it.
        ModelSpec(
            "qwen3-vl-moe",
            "qwen3_vl_moe",
            layers=8,
            seed=23,
            experts=8,
            experts_per_token=2,
            trained=False,
        ),
    )
}


def get_spec(name: str) -> ModelSpec:
    """Looks a specification up by name."""
    if name not in MODELS:
        raise ValueError(f"unknown demonstration model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def train_tokenizer(corpus: Iterable[str], vocab_size: int, family: str = "llava") -> Any:
    """A byte-level BPE tokenizer with chat tokens; any text can be tokenized."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    row = get_family(family)
    special = (*CHAT_TOKENS, *row.special_tokens)
    roles = dict(row.token_roles)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        # The others have roles of their own.
        extra_special_tokens=roles | {"start_of_message": special[1]}
        if roles
        else [special[1], *special[3:]],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(row),
    )


def make_processor(spec: ModelSpec, tokenizer: Any) -> Any:
    """The family's processor: a picture becomes one image token per grid cell."""
    family = get_family(spec.family)
    return family.make_processor(tokenizer, chat_template(family))


def make_model(spec: ModelSpec, tokenizer: Any) -> Any:
    """A freshly initialized float32 model with the massive channel in place."""
    import torch
    import transformers

    torch.manual_seed(spec.seed)
    family = get_family(spec.family)
    model = getattr(transformers, family.model_class)(family.make_config(spec, tokenizer))
    with torch.no_grad():
        table = model.get_input_embeddings().weight  # [vocab, hidden]
        table.normal_(std=0.05)
        table[tokenizer.convert_tokens_to_ids("<|im_start|>"), spec.sink_channel] = spec.sink_value
        for name, weight in model.named_parameters():
            if name.endswith(("position_embedding.weight", "position_embeddings")):
                weight.normal_(std=1.0)  # a patch's own embedding is large and would drown it
        # Depth-scaled residual writers keep the stream's size even over the layers.
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                weight.mul_((2 * spec.layers) ** -0.5)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def to_bfloat16(model: Any) -> Any:
    """Rounds the parameters, in place. Buffers stay: `model.to` would round rotary frequencies,
    which loading a bf16 checkpoint does not, and far positions would turn by other angles."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def published_name(family: Family, name: str) -> str:
    """The name that published checkpoint files have for a parameter of the transformers 5 module.

    transformers 5 nests modules in another way than the files published earlier; readers of such
    checkpoints, vLLM among them, go by the published names.
    """
    for ours, theirs in family.published:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"no published name for {name!r}")


def save_model(model: Any, processor: Any, directory: Path | str) -> None:
    """Writes a bf16 Hugging Face directory: weights, configuration, processor, chat template."""
    import torch
    from safetensors.torch import save_file

    family = get_family(model.config.model_type)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        published_name(family, name): family.as_published(name, tensor.detach())
        .to("cpu", torch.bfloat16)
        .contiguous()
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
    images = {**images["image_processor"], "image_processor_type": family.image_processor_type}
    _edit_json(directory / "preprocessor_config.json", **images)


def _edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def load_model(directory: Path | str, dtype: Any = None) -> tuple[Any, Any]:
    """(model, processor) of a directory, offline."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype or torch.bfloat16, local_files_only=True
    )
    return model.eval(), processor
