"""The canary: a written checkpoint is read back, and must say what the pipeline computed.

Before it is published, one batch of calibration samples goes through the checkpoint as a stranger
would load it: transformers reads what stands before the decoder, every block is built from the
written config.json and the unpacked tensors, one at a time. The last hidden states are those of
the run's quantized stream, or the checkpoint is not published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qig_serve import model_directory
from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme, tensor_specs
from qig_serve.offline.calibration.batches import IMAGE, CalibrationBatch
from qig_serve.offline.passes.capture import first_output, quantized_activations
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.source.loaded_model import LoadedModel, load_front
from qig_serve.offline.source.surplus import (
    check_block,
    check_number_of_blocks,
    check_outside,
    check_prefix,
)
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.packing import unpack_linear
from qig_serve.weight_files import FLOATS

_TOLERANCE = 0.01
"""Of the hidden states' size. On a CPU they are the same bit by bit; on a GPU sums may differ."""


class WrittenModel(LoadedModel):
    """A checkpoint in our form, its blocks still on disk; `block` gives dequantized weights."""

    scheme: QuantScheme

    def _check_blocks(self) -> None:
        """UserError unless the blocks hold what their class and their scheme ask for."""
        manifest = model_directory.read_manifest(self.directory)
        self.scheme = manifest.quant_scheme
        check_prefix(self.source, self.source_prefix)
        check_number_of_blocks(self.source, self.source_prefix, self.num_blocks)
        suffixes = list(tensor_specs(self.scheme, 128, 128))
        for index in range(self.num_blocks):
            block = self.meta_block(index)
            linears = [name for group in self.groups(block) for name in group.linears]
            names = set(block.state_dict())
            names -= {f"{name}.weight" for name in linears}
            names |= {f"{name}.{suffix}" for name in linears for suffix in suffixes}
            check_block(self.source, self.source_name(index, ""), names)

    def _empty_block(self, index: int) -> nn.Module:
        return self.meta_block(index)

    def _stored(self, index: int, name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear not in self.arch.linears or not name.endswith(".weight"):
            return self.source.tensor(self.source_name(index, name))
        parts = {
            suffix: self.source.tensor(self.source_name(index, f"{linear}.{suffix}"))
            for suffix in tensor_specs(self.scheme, 128, 128)
        }
        return unpack_linear(parts, self.scheme)


@dataclass(frozen=True)
class Canary:
    """What a checkpoint must give: one batch, and the hidden states behind the last block."""

    original: LoadedModel
    batch: CalibrationBatch
    wanted: torch.Tensor

    @classmethod
    def of(cls, original: LoadedModel, streams: Streams) -> Canary:
        """From streams that have passed all blocks: the shortest batch that has a picture."""
        chosen = len(streams) - 1
        for b, batch in enumerate(streams.batches):
            if bool((batch.modality == IMAGE).any()):
                chosen = b  # they are longest first
        return cls(original, streams.batches[chosen], streams.quantized.get(chosen, "cpu"))

    @torch.no_grad()
    def check(self, directory: Path) -> float:
        """The relative error of the checkpoint in `directory`; UserError if it is another model."""
        try:
            self._check_source()
            written = _load(directory, self.original)
            self._check_names(written)
            error = self._error(written)
            written.source.close()
        except UserError as fault:
            raise UserError(f"the checkpoint is not published, it is not sound: {fault}") from None
        if not error <= _TOLERANCE:
            raise UserError(
                f"the checkpoint is not published, it does not give what was computed: on the "
                f"calibration samples {', '.join(self.batch.ids[:3])} its last hidden states "
                f"differ by {error:.1%}. Check the source's files, and report this"
            )
        return error

    def _check_source(self) -> None:
        """Every tensor of the source's blocks was read, and is of a type that weights have.

        The same was asked before the work began; here it is asked of what was done.
        """
        original = self.original
        used = {
            original.source_name(index, name)
            for index in range(original.num_blocks)
            for name in original.meta_block(index).state_dict()
        }
        for name in original.source:
            dtype = original.source.dtype(name)
            if name in used and dtype not in FLOATS:
                raise UserError(f"{name} of the source is {dtype}, and was taken for a weight")
        for index in range(original.num_blocks):
            prefix = original.source_name(index, "")
            check_block(original.source, prefix, {n.removeprefix(prefix) for n in used})

    def _check_names(self, written: WrittenModel) -> None:
        """All of the source outside the blocks is there, as it was."""
        source = self.original.source
        inside = (self.original.source_prefix, written.source_prefix)
        for name in sorted({*source, *written.source}):
            if name.startswith(inside):
                continue
            if name not in source or name not in written.source:
                raise UserError(f"{name} is not in both the source and the written checkpoint")
            dtype = source.dtype(name)
            if dtype != written.source.dtype(name) or dtype.startswith("F8"):
                raise UserError(f"{name} is {dtype}, or has another type in the written checkpoint")

    def _error(self, written: WrittenModel) -> float:
        inputs = written.block_inputs(self.batch.inputs)
        hidden = inputs.hidden
        for index in range(written.num_blocks):
            block = written.block(index)
            linears = written.linears(block)
            with quantized_activations(linears, written.scheme.activation_bits is not None):
                hidden = first_output(block(hidden, **inputs.kwargs(index)))
        found, wanted = hidden.cpu().double(), self.wanted.double()
        return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _load(directory: Path, original: LoadedModel) -> WrittenModel:
    import qig_serve.transformers_plugin  # noqa: F401 - what reads our form

    config = model_directory.load_config(directory)
    model, info = load_front(directory, config)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the written checkpoint has no tensor {missing[0]}")
    source = SourceCheckpoint(directory)
    inside = (*original.arch.source_prefixes, f"{original.arch.decoder}.layers.")
    check_outside(source, (n for n in info["unexpected_keys"] if not n.startswith(inside)))
    return WrittenModel(
        directory,
        original.arch,
        config,
        original.processor,
        source,
        model.to(original.device).eval().requires_grad_(False),
        original.device,
    )
