"""Models and inputs through transformers, for generation and for teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.model_directory import cannot_be_loaded, context_length, quantization
from qig_serve.rendering import check_marks, process, render
from qig_serve.samples import Sample, load_image
from qig_serve.weight_files import check_index, weight_files


def load_model(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model in eval mode; a qig checkpoint with its dequantized weights.

    With w4a8 the activations are quantized as well, so its answers and logits are those of the
    served model up to rounding of the sums.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of ours
    if quantization(directory):
        from qig_serve.transformers_plugin import load_dequantized

        model = load_dequantized(directory, dtype=dtype)
    else:
        from transformers import AutoModelForImageTextToText

        weight_files(directory)  # refuses a directory of which programs read different files
        check_index(directory)
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, local_files_only=True
            )
        except MemoryError:
            raise
        except Exception as error:
            raise cannot_be_loaded(directory, error) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def prompt_text(processor: Any, sample: Sample) -> str:
    """The prompt up to where the assistant begins to speak."""
    return render(processor, sample.messages, f"sample {sample.id}", add_generation_prompt=True)


def answer_text(processor: Any, sample: Sample, prompt: str) -> str:
    """The wanted answer with the token that ends the turn: ending in time is part of it.

    The ending is what the chat template writes after the answer, up to its first special token;
    the tokenizer's eos token where the template writes none.
    """
    answer = sample.answer or ""
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = render(processor, [*sample.messages, turn], f"sample {sample.id}")
    tokenizer = processor.tokenizer
    if whole.startswith(prompt) and answer in whole[len(prompt) :]:
        before, _, after = whole[len(prompt) :].partition(answer)
        special = [t for t in tokenizer.all_special_tokens if t and t in after]
        if special:
            first = min(special, key=after.index)
            return before + answer + after[: after.index(first) + len(first)]
    return answer + (tokenizer.eos_token or "")


def answer_length(tokenizer: Any, prompt: str, whole: str) -> int:
    """Tokens of `whole` from the first one that differs from those of `prompt` alone."""
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    same = 0
    for a, b in zip(ids, alone, strict=False):
        if a != b:
            break
        same += 1
    return len(ids) - same


def forced_texts(processor: Any, samples: Sequence[Sample]) -> tuple[list[str], list[int]]:
    """Each sample's prompt with the wanted answer, and the tokens of that answer."""
    prompts = [prompt_text(processor, s) for s in samples]
    texts = [p + answer_text(processor, s, p) for p, s in zip(prompts, samples, strict=True)]
    pairs = zip(prompts, texts, strict=True)
    return texts, [answer_length(processor.tokenizer, p, t) for p, t in pairs]


def model_inputs(
    processor: Any, texts: Sequence[str], samples: Sequence[Sample], model: Any
) -> dict[str, Any]:
    """Tensors for a batch on the model's device and in its dtype, padded on the left.

    `texts` are rendered conversations.

    Special tokens are the chat template's own, as in vLLM: the tokenizer adds none. UserError names
    the sample that is longer than the model has positions.
    """
    images = [[load_image(image) for image in s.images] for s in samples]
    for sample in samples:
        check_marks(sample, processor, f"sample {sample.id}")
    inputs = process(
        processor,
        f"sample{'s' if len(samples) > 1 else ''} {', '.join(s.id for s in samples)}",
        text=list(texts),
        images=images if any(images) else None,
        padding=True,
        padding_side="left",
    )
    context = context_length(model.config.get_text_config())
    lengths = inputs["attention_mask"].sum(-1).tolist()
    for sample, length in zip(samples, lengths, strict=True):
        if context is not None and length > context:
            raise UserError(
                f"sample {sample.id} is {length} tokens long, and the model has {context} "
                "positions (max_position_embeddings in config.json): leave it out, or shrink its "
                "images"
            )
    return dict(inputs.to(model.device, dtype=model.dtype))


def batches(order: Sequence[int], samples: Sequence[Sample], size: int) -> list[list[int]]:
    """`order` cut into batches of at most `size`; text-only samples apart from the others."""
    with_images = [i for i in order if samples[i].images]
    without = [i for i in order if not samples[i].images]
    return [
        part[start : start + size]
        for part in (with_images, without)
        for start in range(0, len(part), size)
    ]
