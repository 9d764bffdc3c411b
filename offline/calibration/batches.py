"""Calibration samples -> batches and masks.

A sample is rendered with the model's own chat template, its answer as the assistant's turn, and
tokenized by the model's own processor. Samples of one length share a batch, so nothing is padded.
The masks separate image tokens and the words of question and answer (real tokens) from what the
template puts around them: real tokens weigh in equalization, all tokens calibrate rounding. (The
template stands in every prompt, and all tokens attend to the first one, which often is the
template's. Without it a real decoder's first key moved when rows made up for each other: attention
in one block was eight times as far from full precision's. With it in equalization, too, our models'
states were a tenth worse at w4a8, and the real decoder's KL was 3 to 7% higher.)
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.rendering import check_marks, guarded, process
from qig_serve.rendering import render as render_chat
from qig_serve.samples import Sample, load_image, sample_sha256

SPECIAL, TEXT, IMAGE = 0, 1, 2
"""Values of `modality`."""
MODALITIES = {"text": TEXT, "image": IMAGE}
"""Those of real tokens, by name."""


@dataclass(frozen=True)
class CalibrationBatch:
    """B samples of T tokens each, without padding."""

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the Hugging Face model."""
    token_mask: torch.Tensor
    """bool [B, T]: real tokens, that is no padding and nothing of the chat template."""
    modality: torch.Tensor
    """int8 [B, T]: 0 special or template, 1 text, 2 image."""
    answer_mask: torch.Tensor
    """bool [B, T]: tokens of the wanted answer."""
    ids: tuple[str, ...]
    """Names of the samples."""
    half: torch.Tensor
    """bool [B]: which of two halves each belongs to, every other one by length. For choices that
    are made on one half and judged on the other; the same for any number of processes."""


@dataclass(frozen=True)
class _Encoded:
    inputs: dict[str, torch.Tensor]
    modality: torch.Tensor  # [T]
    answer_mask: torch.Tensor  # [T]
    name: str
    half: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Samples with the same key can share a batch."""
        shapes = tuple((k, tuple(v.shape[1:])) for k, v in sorted(self.inputs.items()))
        return (len(self.modality), shapes)


def calibration_sha256(samples: Iterable[Sample]) -> str:
    """Hash of pictures, prompts and answers, in their order: what the checkpoint records."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample_sha256(sample)}\0{sample.answer or ''}\0".encode())
    return digest.hexdigest()


def make_batches(
    samples: Sequence[Sample],
    processor: Any,
    image_token_id: int | None,
    *,
    batch_tokens: int = 2048,
    max_length: int = 2048,
    context: int | None = None,
    most: int | None = None,
    ranks: Ranks = ALONE,
    called: str = "calibration sample {}",
) -> list[CalibrationBatch]:
    """Batches of at most `batch_tokens` tokens (at least one sample each), longest first.

    `most` is the largest number of samples of a batch; None: as many as there are of a length.
    `called` is what messages call a sample, with {} for its id.

    With several processes, those of this one: the samples are dealt out by length, and there must
    be one for each. UserError names the sample that is longer than `max_length` (images are never
    cut) or than `context`, the model's positions, that cannot be rendered, or whose picture cannot
    be read.
    """
    if len(samples) < ranks.size:
        raise UserError(
            f"{ranks.size} processes for {len(samples)} calibration samples: start no more "
            "processes than there are samples"
        )
    encodings: list[_Encoded] = []
    for sample in samples:
        name = called.format(sample.id)
        encoded = _encode(sample, processor, image_token_id, name)
        if len(encoded.modality) > max_length:
            raise UserError(
                f"{name} is {len(encoded.modality)} tokens long, more than "
                f"{max_length}: leave it out, shrink its images, or raise --max-length"
            )
        if context is not None and len(encoded.modality) > context:
            raise UserError(
                f"{name} is {len(encoded.modality)} tokens long, and the "
                f"model has {context} positions (max_position_embeddings in config.json): shorten "
                "it, shrink its images, or leave it out"
            )
        encodings.append(encoded)
    encodings.sort(key=lambda e: (-e.key[0], str(e.key)))
    encodings = [replace(e, half=bool(i % 2)) for i, e in enumerate(encodings)]
    batches = []
    for key, alike in groupby(ranks.shard(encodings), key=lambda e: e.key):
        size = min(max(1, batch_tokens // key[0]), most or len(samples))
        group = list(alike)
        batches += [_collate(group[i : i + size]) for i in range(0, len(group), size)]
    return batches


def token_counts(batches: Iterable[CalibrationBatch]) -> dict[str, int]:
    """Tokens by modality: image, text, and special (template) ones."""
    names = {"image": IMAGE, "text": TEXT, "special": SPECIAL}
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        for name, code in names.items():
            counts[name] += int((batch.modality == code).sum())
    return counts


def _collate(group: Sequence[_Encoded]) -> CalibrationBatch:
    inputs = {k: torch.cat([e.inputs[k] for e in group]) for k in group[0].inputs}
    modality = torch.stack([e.modality for e in group])
    return CalibrationBatch(
        inputs=inputs,
        token_mask=modality != SPECIAL,
        modality=modality,
        answer_mask=torch.stack([e.answer_mask for e in group]),
        ids=tuple(e.name for e in group),
        half=torch.tensor([e.half for e in group]),
    )


def _encode(sample: Sample, processor: Any, image_token_id: int | None, name: str) -> _Encoded:
    messages = list(sample.messages)
    if sample.answer:
        part = {"type": "text", "text": sample.answer}
        messages.append({"role": "assistant", "content": [part]})
    check_marks(sample, processor, name)
    text, spans = _render(messages, processor, bool(sample.answer), name)
    try:
        images = [load_image(image) for image in sample.images]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    inputs = process(processor, name, text=[text], images=images or None)
    ids = inputs["input_ids"][0]
    if images and image_token_id is not None and not bool((ids == image_token_id).any()):
        raise UserError(f"{name}: {_left_out(text, processor, image_token_id)}")
    with guarded(name, "the tokenizer cannot process it"):
        plain = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    modality, answer = _align(
        ids.tolist(), plain["input_ids"], plain["offset_mapping"], spans, image_token_id, name
    )
    return _Encoded(dict(inputs), modality, answer, sample.id)


def _left_out(text: str, processor: Any, image_token_id: int) -> str:
    """Why the tokens of a rendered text have none of an image."""
    token = getattr(processor, "image_token", None)
    if isinstance(token, str) and token in text:
        return (
            f"its image stands as {token!r} in the prompt, and config.json says that an image's "
            f"token is {image_token_id}: give the config.json and the tokenizer of one model"
        )
    return "the chat template leaves its images out; give the model's own template"


def _render(
    messages: Sequence[dict[str, Any]], processor: Any, answered: bool, name: str
) -> tuple[str, list[tuple[int, int, bool]]]:
    """A conversation through the chat template, and where its texts stand: (start, end, answer).

    The same on every day, so that a run can be repeated and a checkpoint's record compared.
    Rendered once more with marks in place of the texts, so that a text which repeats the
    template's own words is still found where it is.
    """

    def render(texts: Sequence[str]) -> str:
        left = iter(texts)
        named = [
            {
                "role": m["role"],
                "content": [
                    {"type": "image"}
                    if p["type"] == "image"
                    else {"type": "text", "text": next(left)}
                    for p in m["content"]
                ],
            }
            for m in messages
        ]
        return render_chat(processor, named, name, today=False)

    turns = [i for i, m in enumerate(messages) for p in m["content"] if p["type"] == "text"]
    texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
    marks = [f"qigtext{i}mark" for i in range(len(texts))]
    text, marked = render(texts), render(marks)
    spans = []
    cursor = at = 0
    for turn, content, mark in zip(turns, texts, marks, strict=True):
        before, found, _ = marked[cursor:].partition(mark)
        start = at + len(before)
        if content not in text[start : start + len(content)]:
            content = content.strip()  # some templates trim
        if not found or text[at : start + len(content)] != before + content:
            raise UserError(
                f"{name}: the chat template drops or rewrites its text "
                f"{content[:40]!r}, so its tokens cannot be distinguished from the template's"
            )
        at = start + len(content)
        cursor += len(before) + len(mark)
        spans.append((start, at, answered and turn == len(messages) - 1))
    return text, spans


def _align(
    ids: Sequence[int],
    plain: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int, bool]],
    image_token_id: int | None,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Modality [T] and answer mask [T] of the processor's tokens.

    The processor writes an image as many tokens and may put markers around them; leaving those
    out, its tokens are those of the rendered text, whose places are known. Only where a marker
    touches the text they may differ: Gemma 3 puts line breaks around an image, which merge with
    those of the template.
    """
    modality = torch.zeros(len(ids), dtype=torch.int8)
    answer = torch.zeros(len(ids), dtype=torch.bool)
    words = [i for i, token in enumerate(ids) if token != image_token_id]
    rendered = [i for i, token in enumerate(plain) if token != image_token_id]
    pairs = _pair([plain[i] for i in rendered], [ids[i] for i in words])
    place = {rendered[a]: words[b] for a, b in pairs}
    for i, token in enumerate(ids):
        if token == image_token_id:
            modality[i] = IMAGE
    for first, last, is_answer in spans:
        inside = [i for i in rendered if offsets[i][0] < last and offsets[i][1] > first]
        if any(i not in place for i in inside[1:-1]):
            raise UserError(
                f"{name}: the processor's tokens are not those of the chat "
                "template's text; this processor is not supported"
            )
        for i in inside:
            if i in place:
                modality[place[i]] = TEXT
                answer[place[i]] = is_answer
    return modality, answer


def _pair(plain: Sequence[int], ids: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (in plain, in ids) of equal tokens, in order; ids may have further ones between."""
    pairs = []
    at = 0
    for i, token in enumerate(ids):
        if at < len(plain) and token == plain[at]:
            pairs.append((at, i))
            at += 1
    if at == len(plain):
        return pairs
    blocks = difflib.SequenceMatcher(None, plain, ids, autojunk=False).get_matching_blocks()
    return [(a + k, b + k) for a, b, size in blocks for k in range(size)]
