"""The two streams of hidden states that go through the decoder side by side.

The full-precision stream is what the original model computes, the quantized stream what the
already quantized prefix makes of the same samples. Both advance block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve.formats import QuantScheme
from qig_serve.offline.calibration.batches import CalibrationBatch
from qig_serve.offline.passes.capture import (
    Store,
    check_finite,
    first_output,
    quantized_activations,
    within_range,
)
from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.source.loaded_model import BlockInputs


@dataclass(frozen=True)
class OutputGradients:
    """Gradients of answers behind every block; see output_gradients.py."""

    batches: tuple[int, ...]
    """Of these batches."""
    draws: int
    behind: tuple[Store, ...]
    """Of each block: [B, T, C] in bfloat16, by the keys of a batch."""
    seconds: float = 0.0
    """That finding them took."""

    def keys(self, b: int) -> range:
        """Places of a batch's draws in the stores."""
        return range(b * self.draws, (b + 1) * self.draws)


@dataclass
class Streams:
    """Hidden states before the block at hand, one batch of same-length samples at a time."""

    scheme: QuantScheme
    dtype: torch.dtype
    """The model's dtype: what scales, norms and biases are stored in."""
    device: torch.device
    batch_tokens: int
    """Tokens that pass a module at a time."""
    batches: Sequence[CalibrationBatch]
    inputs: Sequence[BlockInputs]
    """What the model hands to its decoder for each batch."""
    rounded_inputs: Sequence[BlockInputs]
    """The same of the quantized stream: its embeddings may be rounded, and its keys are its own."""
    fp: Store
    quantized: Store
    index: int = 0
    """The block at hand."""
    folder: Path | None = None
    """Where activations wait if not in host memory."""
    ranks: Ranks = ALONE
    """The processes that share the samples; the batches are those of this one."""
    output_gradients: OutputGradients | None = None
    """For a rounding method that asks for them."""
    share: float = 1.0
    """Part of the calibration tokens that the batches are; less in a dry run."""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def quantizes_activations(self) -> bool:
        """Whether linears see int8 inputs."""
        return self.scheme.activation_bits is not None

    def kwargs(self, b: int, stream: Store | None = None) -> Mapping[str, Any]:
        """What the block at hand is called with beside the hidden states of batch b.

        stream: `fp`, unless it is `quantized`.
        """
        inputs = self.rounded_inputs if stream is self.quantized else self.inputs
        return inputs[b].kwargs(self.index)

    def new_store(self, name: str) -> Store:
        """An empty store beside the streams."""
        return Store(self.folder, name)

    def mask(self, b: int) -> torch.Tensor:
        """Real tokens of batch b, bool [B, T]: no padding, no template."""
        return self.batches[b].token_mask.to(self.device)

    def modality(self, b: int) -> torch.Tensor:
        """0 special, 1 text, 2 image; [B, T]."""
        return self.batches[b].modality.to(self.device)

    @torch.no_grad()
    def advance(
        self, original: nn.Module, quantized: nn.Module, linears: Sequence[nn.Module], where: str
    ) -> float:
        """Sends both streams through a block: the original, and the quantized one.

        `linears` are those of the quantized block that see int8 inputs under w4a8. Returns the
        mean squared error between the streams over the mean square of the full-precision one,
        real tokens of all processes only.
        """
        error, energy = 0.0, 0.0
        for b in range(len(self)):
            full = first_output(original(self.fp.get(b, self.device), **self.kwargs(b)))
            in_range = within_range(quantized, self.dtype, where)
            with quantized_activations(linears, self.quantizes_activations), in_range:
                kwargs = self.kwargs(b, self.quantized)
                other = first_output(quantized(self.quantized.get(b, self.device), **kwargs))
            check_finite(full, f"{where}, full-precision output")
            check_finite(other, f"{where}, output after quantization")
            mask = self.mask(b)
            error += float((full - other)[mask].double().square().sum())
            energy += float(full[mask].double().square().sum())
            self.fp.put(b, full)
            self.quantized.put(b, other)
        self.index += 1
        error, energy = self.ranks.total(error, energy)
        return error / max(energy, 1e-30)
