"""Greedy answers by teacher forcing: one forward pass where generation takes one per token.

Greedy decoding gives a text exactly when the model, reading it, finds each next token the
most likely. So whether a model answers rightly, and whether it answers as full precision does, can
be found from two known texts: the wanted answer, and full precision's own answer where that
differs. What else a model would have said stays unknown (OTHER). Token for token: an answer that
differs from the wanted one in case or white space alone counts as another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qig_serve.evaluation import Progress
from qig_serve.evaluation.generation import generate_with
from qig_serve.evaluation.models import (
    batches,
    forced_texts,
    load_model,
    model_inputs,
)
from qig_serve.model_directory import load_processor, model_dtype
from qig_serve.samples import Sample

OTHER = "(another answer)"
_BATCH = 32


@torch.inference_mode()
def spoken(
    model: Any, processor: Any, samples: Sequence[Sample], progress: Callable[[int, int], None]
) -> list[bool]:
    """Whether greedy decoding would give each sample's answer, and end there."""
    texts, lengths = forced_texts(processor, samples)
    found = [False] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: (lengths[i], len(texts[i])))
    done = 0
    for group in batches(order, samples, _BATCH):
        inputs = model_inputs(
            processor, [texts[i] for i in group], [samples[i] for i in group], model
        )
        longest = max(lengths[i] for i in group)
        logits = model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits
        most_likely = logits[:, :-1].argmax(-1)  # [B, longest]
        for row, i in enumerate(group):
            wanted = inputs["input_ids"][row, -lengths[i] :]
            found[i] = torch.equal(most_likely[row, -lengths[i] :], wanted)
        done += len(group)
        progress(done, len(samples))
    return found


def forced_answers(
    reference: Path,
    models: Sequence[tuple[str, Path]],
    samples: Sequence[Sample],
    max_tokens: int,
    progress: Progress,
) -> dict[str, list[str]]:
    """Name -> the greedy answer to each sample; `models` may hold the reference itself.

    Only where the reference's answer is not the wanted one is it generated, once.
    """
    processor = load_processor(reference)
    wanted = [s.answer or "" for s in samples]

    def step(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(f"{name}: answers (forced)", done, total)

    model = load_model(reference, model_dtype(reference))
    right = spoken(model, processor, samples, step("full precision"))
    others = [i for i, hit in enumerate(right) if not hit]
    texts = generate_with(
        model, processor, [samples[i] for i in others], max_tokens, step("full precision, wrong")
    )
    said = dict(zip(others, texts, strict=True))
    out = {}
    for name, directory in models:
        if directory.resolve() == reference.resolve():
            out[name] = [said.get(i, answer) for i, answer in enumerate(wanted)]
            continue
        del model  # one model in memory at a time
        model = load_model(directory, model_dtype(directory))
        right = spoken(model, processor, samples, step(name))
        answers = [a if hit else OTHER for a, hit in zip(wanted, right, strict=True)]
        asked = [i for i in others if not right[i] and said[i]]
        same = spoken(
            model,
            processor,
            [replace(samples[i], answer=said[i]) for i in asked],
            step(f"{name}, as full precision"),
        )
        for i, hit in zip(asked, same, strict=True):
            if hit:
                answers[i] = said[i]
        out[name] = answers
    return out
