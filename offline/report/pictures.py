"""The picture that explains the method: where in an image, and on which words, the weight lies.

What is pictured; report/drawing.py draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from qig_serve.errors import UserError
from qig_serve.offline.calibration.batches import CalibrationBatch
from qig_serve.offline.report.token_map import Box, token_boxes
from qig_serve.samples import Sample, load_image

SAMPLES = 2
"""So many are pictured in a report."""


@dataclass(frozen=True)
class TokenPicture:
    """One sample with the token weights of some layers."""

    name: str
    images: tuple[Image.Image, ...]
    boxes: Mapping[int, tuple[int, Box | None]]
    """Position of an image token -> (which picture, its box): token_map.token_boxes."""
    tokens: tuple[str, ...]
    """Text of every token, "" for image tokens."""
    counted: torch.Tensor
    """[T] bool: tokens that take part in the method; template tokens do not."""
    answer_start: int
    """Position of the first token of the answer; len(tokens) if there is none."""
    weights: Mapping[str, torch.Tensor]
    """Layer -> token weights [T], which sum to 1."""

    def image_share(self, layer: str) -> float:
        """Share of the weight that lies on image tokens, 0..1."""
        weights = self.weights[layer]
        return float(weights[sorted(self.boxes)].sum() / weights.sum())

    def to_json(self, completeness: Mapping[str, float]) -> dict[str, Any]:
        """Tokens, their boxes and their weights, JSON-ready; `completeness`: layer -> error."""
        return {
            "name": self.name,
            "tokens": [
                {
                    "text": text,
                    "counted": bool(counted),
                    "image": self.boxes[i][0] if i in self.boxes else None,
                    "box": self.boxes[i][1] if i in self.boxes else None,
                }
                for i, (text, counted) in enumerate(zip(self.tokens, self.counted, strict=True))
            ],
            "layers": {
                layer: {
                    "image_share": self.image_share(layer),
                    "completeness_error": completeness[layer],
                    "weights": weights.tolist(),
                }
                for layer, weights in self.weights.items()
            },
        }

    def words(self, layer: str) -> list[tuple[str, float, bool, bool]]:
        """(word, its weight, whether it counts, whether it is of the answer) in order.

        A word ends before a space or where the answer begins; its weight is its tokens' sum.
        """
        words: list[tuple[str, float, bool, bool]] = []
        for position, text in enumerate(self.tokens):
            if position in self.boxes or not text:
                continue
            counts, answer = bool(self.counted[position]), position >= self.answer_start
            weight = float(self.weights[layer][position])
            glued = words and not text[0].isspace() and not words[-1][0][-1:].isspace()
            if glued and words[-1][2:] == (counts, answer):
                words[-1] = (words[-1][0] + text, words[-1][1] + weight, counts, answer)
            else:
                words.append((text, weight, counts, answer))
        return words


def token_picture(
    name: str,
    config: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image],
    counted: torch.Tensor,
    answer_start: int,
    weights: Mapping[str, torch.Tensor],
) -> TokenPicture:
    """From what the processor made of one sample (a batch of one, without padding).

    UserError when the family's image tokens cannot be mapped to pixels.
    """
    ids = torch.as_tensor(inputs["input_ids"]).reshape(-1).tolist()
    boxes = token_boxes(config, processor, dict(inputs), images)
    texts = [
        "" if i in boxes else processor.tokenizer.decode([token]) for i, token in enumerate(ids)
    ]
    return TokenPicture(
        name,
        tuple(images),
        boxes,
        tuple(texts),
        counted.reshape(-1).bool().cpu(),
        answer_start,
        {layer: w.reshape(-1).float().cpu() for layer, w in weights.items()},
    )


@dataclass
class KeptWeights:
    """Token weights of a few samples and layers, kept for the report's pictures."""

    layers: tuple[int, ...]
    batches: Sequence[CalibrationBatch]
    chosen: dict[tuple[int, int], Sample]
    """(batch, row) -> sample."""
    weights: dict[tuple[int, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)
    """Why a sample has no picture: for the report's warnings."""

    @classmethod
    def choose(
        cls, samples: Sequence[Sample], batches: Sequence[CalibrationBatch], layers: int
    ) -> KeptWeights:
        """Of the batches' samples those with images and the longest answers; three layers."""
        own = {name for batch in batches for name in batch.ids}
        pictured = [s for s in samples if s.id in own and s.images]
        pictured.sort(key=lambda s: -len(s.answer or ""))
        by_name = {s.id: s for s in pictured[:SAMPLES]}
        chosen = {
            (b, row): by_name[name]
            for b, batch in enumerate(batches)
            for row, name in enumerate(batch.ids)
            if name in by_name
        }
        return cls((0, layers // 2, layers - 1), batches, chosen)

    def keep(self, index: int, name: str, weights: Sequence[torch.Tensor]) -> None:
        """Keeps what is wanted of the token weights ([B, T] of each batch) of group `name`."""
        if index not in self.layers or name != "qkv":
            return
        for b, row in self.chosen:
            kept = self.weights.setdefault((b, row), {})
            kept[f"layer {index}"] = weights[b][row].float().cpu()

    def pictures(self, config: Any, processor: Any) -> list[TokenPicture]:
        """The pictures; `unmapped` says which could not be made."""
        made = []
        for (b, row), weights in self.weights.items():
            batch, sample = self.batches[b], self.chosen[b, row]
            answer = batch.answer_mask[row].nonzero()
            length = batch.answer_mask.shape[1]
            images = [load_image(image) for image in sample.images]
            inputs = _of_row(batch, row)
            try:
                picture = token_picture(
                    f"sample {sample.id}",
                    config,
                    processor,
                    inputs,
                    images,
                    batch.token_mask[row],
                    int(answer[0]) if len(answer) else length,
                    weights,
                )
            except UserError as error:
                self.unmapped.append(f"No picture of sample {sample.id}: {error}")
                continue
            made.append(picture)
        return made


def _of_row(batch: CalibrationBatch, row: int) -> dict[str, torch.Tensor]:
    """The model inputs of one sample. Images of a batch lie end to end, equally many of each."""
    size = len(batch.ids)
    inputs = {}
    for name, value in batch.inputs.items():
        each = len(value) // size
        inputs[name] = value[row * each : (row + 1) * each]
    return inputs
