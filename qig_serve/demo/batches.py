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

from qig_serve.demo.families import get_family
from qig_serve.demo.family_row import IMAGE_TOKENS, Positions
from qig_serve.demo.model import SUFFIX, question_prefix
from qig_serve.demo.pictures import Pixels

# Weight of an answer's tokens in the loss. A caption has twenty times the tokens of the other
# answers; yes and no are one bit per question, and the slowest to be learned.
TOKEN_WEIGHTS = {"caption": 0.5, "exist": 3.0, "relation": 3.0}


@dataclass(frozen=True)
class Batch:
    """B sequences of length L with T answer tokens in all."""

    pixels: torch.Tensor  # [B, 3, 144, 144], -1..1
    ids: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [3, B, L], one row per axis
    mask: torch.Tensor  # [B, 1, L, L], 0 or a large negative number
    where: torch.Tensor  # [T] flat index (B * L) of the token that predicts an answer token
    target: torch.Tensor  # [T]
    weight: torch.Tensor  # [T]
    question: torch.Tensor  # [T] which question of the batch an answer token belongs to

    def to(self, device: str) -> Batch:
        """The batch with its tensors on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def one_axis(start: int, count: int) -> Positions:
    """Positions of text: the same on all three axes."""
    return [(i, i, i) for i in range(start, start + count)]


class Encoder:
    """Turns text into ids as chat template and processor do, with a cache."""

    def __init__(self, tokenizer: Any, family_name: str = "llava") -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        family = get_family(family_name)
        head, tail = map(self._encode, question_prefix(family).split(family.image_token))
        image = tokenizer.convert_tokens_to_ids(family.image_token)
        self.before_image = len(head)
        self.prefix = head + [image] * IMAGE_TOKENS + tail
        self.positions = one_axis(0, len(head)) + family.image_positions(len(head))
        self.positions += one_axis(max(self.positions[-1]) + 1, len(tail))
        self.next_position = max(self.positions[-1]) + 1  # where a question starts
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
    """One sequence per picture, of its (type, question, answer) triples."""
    shared = len(encoder.prefix)
    rows, segments = [], []
    positions: list[Positions] = []
    where: list[tuple[int, int]] = []
    target: list[int] = []
    weight: list[float] = []
    question: list[int] = []
    count = 0
    for row, asked in enumerate(questions):
        ids, segment, position = list(encoder.prefix), [0] * shared, list(encoder.positions)
        for number, (kind, text, reply) in enumerate(asked, start=1):
            answer = encoder.answer(reply)
            block = encoder.question(text) + answer[:-1]
            first = len(ids) + len(block) - len(answer)
            where += [(row, first + i) for i in range(len(answer))]
            target += answer
            weight += [TOKEN_WEIGHTS.get(kind, 1.0)] * len(answer)
            question += [count] * len(answer)
            count += 1
            ids += block
            segment += [number] * len(block)
            position += one_axis(encoder.next_position, len(block))
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
        positions=torch.stack(
            [pad([[p[axis] for p in one] for one in positions], 0) for axis in range(3)]
        ),
        mask=mask[:, None],
        where=torch.tensor([row * length + column for row, column in where]),
        target=torch.tensor(target),
        weight=torch.tensor(weight),
        question=torch.tensor(question),
    )


def answer_logits(model: Any, batch: Batch, before_image: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the answer tokens [T, vocab], image tokens [B, 36, hidden])."""
    family = get_family(model.config.model_type)
    image = family.image_tokens(model, batch.pixels)
    text = model.get_input_embeddings()(batch.ids)  # [B, L, hidden]
    after = before_image + IMAGE_TOKENS
    embeds = torch.cat([text[:, :before_image], image, text[:, after:]], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.positions if family.multi_axis else batch.positions[0],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.where]), image
