"""Keeps the token weights of a few samples and layers, for the report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.offline.calibration import CalibrationBatch
from qig_serve.offline.pictures import TokenPicture, token_picture
from qig_serve.samples import Sample, load_image

SAMPLES = 2


@dataclass
class PicturedWeights:
    """Which samples are pictured, and what was kept of them."""

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
    ) -> PicturedWeights:
        """The samples with images and the longest answers; first, middle and last layer."""
        pictured = sorted((s for s in samples if s.images), key=lambda s: -len(s.answer or ""))
        by_name = {s.id: s for s in pictured[:SAMPLES]}
        chosen = {
            (b, row): by_name[name]
            for b, batch in enumerate(batches)
            for row, name in enumerate(batch.ids)
            if name in by_name
        }
        return cls((0, layers // 2, layers - 1), batches, chosen)

    def keep(self, index: int, name: str, weights: Sequence[torch.Tensor]) -> None:
        """Keeps what is wanted of the token weights (a batch, [B, T]) of group `name`."""
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
    """The model inputs of one sample. Images of a batch lie end to end, equally many a sample."""
    size = len(batch.ids)
    inputs = {}
    for name, value in batch.inputs.items():
        each = len(value) // size
        inputs[name] = value[row * each : (row + 1) * each]
    return inputs
