"""Training batches: a dozen questions share one picture in one sequence.

A sequence is the template's prefix with the image tokens, then every question with its answer.
A question attends to the prefix and to itself, and its positions go on from the prefix, so each
is computed exactly as it will be when it is asked alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qig_serve.demo.model import PREFIX, SUFFIX
from qig_serve.demo.pictures import GRID, Pixels

IMAGE_TOKENS = GRID * GRID
CAPTION_WEIGHT = 0.5  # a caption has twenty times the tokens of the other answers


@dataclass(frozen=True)
class Batch:
    """B sequences of length L with T answer tokens in all."""

    pixels: torch.Tensor  # [B, 3, 144, 144], -1..1
    ids: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [B, L]
    mask: torch.Tensor  # [B, 1, L, L], 0 or a large negative number
    where: torch.Tensor  # [T] flat index (B * L) of the token that predicts an answer token
    target: torch.Tensor  # [T]
    weight: torch.Tensor  # [T]
    question: torch.Tensor  # [T] which question of the batch an answer token belongs to

    def to(self, device: str) -> Batch:
        """The batch with its tensors on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Encoder:
    """Turns text into ids as chat template and processor do, with a cache."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        head, tail = PREFIX.split("<image>")
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.before_image = len(self._encode(head))
        self.prefix = self._encode(head) + [image] * IMAGE_TOKENS + self._encode(tail)
        self.pad = int(tokenizer.pad_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cached(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def question(self, text: str) -> list[int]:
        """What follows the image up to the answer."""
        return self._cached(text + SUFFIX)

    def answer(self, text: str) -> list[int]:
        """The answer with the token that ends it."""
        return self._cached(text + "<|im_end|>")


def to_pixels(pictures: Iterable[Pixels]) -> torch.Tensor:
    """[B, 3, 144, 144] in -1..1, as the saved image processor normalizes."""
    stacked = torch.from_numpy(np.stack(list(pictures)))
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def make_batch(
    encoder: Encoder,
    pictures: Sequence[Pixels],
    questions: Sequence[Sequence[tuple[str, str, str]]],
    dtype: torch.dtype,
) -> Batch:
    """One sequence a picture, of its (type, question, answer) triples."""
    shared = len(encoder.prefix)
    rows, segments, positions = [], [], []
    where: list[tuple[int, int]] = []
    target: list[int] = []
    weight: list[float] = []
    question: list[int] = []
    count = 0
    for row, asked in enumerate(questions):
        ids, segment, position = list(encoder.prefix), [0] * shared, list(range(shared))
        for number, (kind, text, reply) in enumerate(asked, start=1):
            answer = encoder.answer(reply)
            block = encoder.question(text) + answer[:-1]
            first = len(ids) + len(block) - len(answer)
            where += [(row, first + i) for i in range(len(answer))]
            target += answer
            weight += [CAPTION_WEIGHT if kind == "caption" else 1.0] * len(answer)
            question += [count] * len(answer)
            count += 1
            ids += block
            segment += [number] * len(block)
            position += range(shared, shared + len(block))
        rows.append(ids)
        segments.append(segment)
        positions.append(position)
    length = -(-max(map(len, rows)) // 8) * 8

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([one + [value] * (length - len(one)) for one in lists])

    segment_ids = pad(segments, -1)
    own = segment_ids[:, None, :] == segment_ids[:, :, None]  # [B, L, L]
    seen = (own | (segment_ids[:, None, :] == 0)).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return Batch(
        pixels=to_pixels(pictures).to(dtype),
        ids=pad(rows, encoder.pad),
        positions=pad(positions, 0),
        mask=mask[:, None],
        where=torch.tensor([row * length + column for row, column in where]),
        target=torch.tensor(target),
        weight=torch.tensor(weight),
        question=torch.tensor(question),
    )


def answer_logits(model: Any, batch: Batch, before_image: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the answer tokens [T, vocab], image tokens [B, 36, hidden])."""
    image = image_tokens(model, batch.pixels)
    text = model.get_input_embeddings()(batch.ids)  # [B, L, hidden]
    after = before_image + IMAGE_TOKENS
    embeds = torch.cat([text[:, :before_image], image, text[:, after:]], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.where]), image


def image_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens as the decoder receives them, [B, 36, hidden]."""
    features = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    return torch.stack(list(features))
