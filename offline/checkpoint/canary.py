"""The canary: a written checkpoint is read back, and must say what the pipeline computed.

Before it is published, in whatever form, one batch of calibration samples goes through the
checkpoint as a stranger would load it (written.py): transformers reads what stands before the
decoder, every block is built from the written config.json and the unpacked tensors, one at a time.
The last hidden states are those of the run's quantized stream, or it is not published. Of an output
head or an embedding in 8 bits every weight is compared with the source's.

What a checkpoint in our form gives for a sample that everyone can make is kept in canary.json, so
that `qig-serve doctor` can ask again: of a copy, years later, with other versions. Where the model
takes no such sample there is no canary.json, and the report warns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qig_serve import model_directory
from qig_serve.errors import UserError
from qig_serve.formats import VOCABULARY_SCHEME
from qig_serve.offline.calibration.batches import IMAGE, CalibrationBatch, make_batches
from qig_serve.offline.checkpoint.written import CompressedModel, PlainModel, WrittenModel
from qig_serve.offline.disk import write_text
from qig_serve.offline.passes.capture import first_output, quantized_activations
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.source.surplus import check_block
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.packing import unpack_rows
from qig_serve.samples import sample_from_parts
from qig_serve.weight_files import FLOATS

RECORD_FILE = "canary.json"
Size = tuple[int, int]
"""Width and height of a picture, in pixels."""
USUAL_SIZE: Size = (96, 64)
_DIVISIBLE_SIZE: Size = (224, 224)
_LARGEST = 4096  # width or height
_ROWS = 4096  # of a table, compared at once
_HALF_A_STEP = 0.501  # and what fp32 rounds
READERS: Mapping[str, type[WrittenModel]] = {
    "qig": WrittenModel,
    "compressed-tensors": CompressedModel,
    "plain": PlainModel,
}
"""Form -> what reads it."""
_ELSEWHERE = 0.05
"""Relative error allowed of the record: other machines and versions add up in other orders."""


@dataclass(frozen=True)
class Canary:
    """What a checkpoint must give: one batch, and the hidden states behind the last block."""

    original: LoadedModel
    batch: CalibrationBatch
    wanted: torch.Tensor

    @classmethod
    def of(cls, original: LoadedModel, streams: Streams) -> Canary:
        """From streams that have passed all blocks: the shortest batch that has a picture."""
        chosen = cls.choose(streams)
        return cls(original, streams.batches[chosen], streams.quantized.get(chosen, "cpu"))

    @staticmethod
    def choose(streams: Streams) -> int:
        """Its batch."""
        chosen = len(streams) - 1
        for b, batch in enumerate(streams.batches):
            if bool((batch.modality == IMAGE).any()):
                chosen = b  # they are longest first
        return chosen

    @torch.no_grad()
    def check(self, directory: Path, form: str = "qig") -> float:
        """The relative error of the checkpoint in `directory`; UserError if it is another model.

        One of our own form that passes is given its record.
        """
        try:
            self._check_source()
            written = READERS[form].open(directory, self.original.processor, self.original.device)
            self._check_names(written)
            size, common = _common_sample(written) if form == "qig" else (USUAL_SIZE, [])
            found = last_hidden(written, [self.batch, *common])
            error = _distance(found[0], self.wanted)
            if common:
                _write_record(directory, found[1], size)
            written.source.close()
        except UserError as fault:
            raise UserError(f"the checkpoint is not published, it is not sound: {fault}") from None
        if not error <= written.tolerance:
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
        """All of the source outside the blocks is there, as it was or rounded."""
        source = self.original.source
        inside = tuple(
            model.source_name(index, "")
            for model in (self.original, written)
            for index in range(model.num_blocks)
        )
        rounded = set()
        for module in self.original.eight_bit:
            parts = {f"{module}.{suffix}" for suffix in VOCABULARY_SCHEME.suffixes}
            rounded |= {f"{module}.weight", *parts}
            _check_rounding(source, written.source, module)
        for name in sorted({*source, *written.source} - rounded):
            if name.startswith(inside):
                continue
            if name not in source or name not in written.source:
                raise UserError(f"{name} is not in both the source and the written checkpoint")
            dtype = source.dtype(name)
            if dtype != written.source.dtype(name) or dtype.startswith("F8"):
                raise UserError(f"{name} is {dtype}, or has another type in the written checkpoint")


@torch.no_grad()
def last_hidden(written: WrittenModel, batches: Sequence[CalibrationBatch]) -> list[torch.Tensor]:
    """Hidden states [B, T, C] behind the last block, of each batch."""
    inputs = [written.block_inputs(batch.inputs) for batch in batches]
    hidden = [before.hidden for before in inputs]
    for index in range(written.num_blocks):
        block = written.block(index)
        linears = written.linears(block)
        with quantized_activations(linears, written.activation_bits is not None):
            for b, before in enumerate(inputs):
                hidden[b] = first_output(block(hidden[b], **before.kwargs(index)))
    return [states.cpu() for states in hidden]


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the wanted size; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _check_rounding(source: SourceCheckpoint, written: SourceCheckpoint, module: str) -> None:
    """UserError unless a table in 8 bits is within half a step of the source's, row by row."""
    name = f"{module}.weight"
    if name in written:
        raise UserError(f"{name} is in the written checkpoint, which has it in 8 bits, too")
    parts = {s: written.tensor(f"{module}.{s}") for s in VOCABULARY_SCHEME.suffixes}
    weight = source.tensor(name)
    scale = parts["weight_scale"]
    for start in range(0, len(weight), _ROWS):
        some = {suffix: tensor[start : start + _ROWS] for suffix, tensor in parts.items()}
        found = unpack_rows(some, VOCABULARY_SCHEME, torch.float32)
        error = (found - weight[start : start + _ROWS].float()).abs()
        if not bool((error <= _HALF_A_STEP * scale[start : start + _ROWS]).all()):
            raise UserError(
                f"{module} in the written checkpoint is further than half a step from {name} of "
                "the source"
            )


# --- the record ----------------------------------------------------------------------------------


def _common_sample(written: WrittenModel) -> tuple[Size, list[CalibrationBatch]]:
    """A sample that the checkpoint takes, and the (width, height) of its picture; none if none is.

    Where the processor does not resize, not every picture fits: the tower's own size is tried, and
    one that common patches divide.
    """
    own = getattr(getattr(written.config, "vision_config", None), "image_size", None)
    sizes = [USUAL_SIZE, *([(own, own)] if isinstance(own, int) else []), _DIVISIBLE_SIZE]
    for size in sizes:
        for batch in (batches := _sample_of(written, size)):
            try:
                written.block_inputs(batch.inputs)
            except UserError:
                break
            return size, batches
    return USUAL_SIZE, []


def _sample_of(written: WrittenModel, size: Size) -> list[CalibrationBatch]:
    """One that depends on nothing but the checkpoint's files and the (width, height).

    None where the processor or the chat template refuses it.
    """
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([x * 2 + y, y * 3 + 40, (x // 8 + y // 8) % 2 * 200], -1).astype(np.uint8)
    sample = sample_from_parts(
        "canary", "canary", Image.fromarray(pixels), "What is in the picture?", "a pattern"
    )
    try:
        return make_batches([sample], written.processor, written.image_token_id)
    except UserError:
        return []


def _write_record(directory: Path, hidden: torch.Tensor, size: Size) -> None:
    record: dict[str, Any] = {"last_hidden": [float(f"{v:.6g}") for v in hidden[0, -1].tolist()]}
    if size != USUAL_SIZE:
        record["picture"] = size
    write_text(directory / RECORD_FILE, json.dumps(record) + "\n")


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [None]
    return all(isinstance(side, int) and 0 < side <= _LARGEST for side in sides)


def compare_with_record(directory: Path) -> float | None:
    """The relative error to what the checkpoint gave when it was written; None without a record.

    UserError when it is another model now, or cannot be loaded.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    record = model_directory.read_json(path)
    values, size = record.get("last_hidden"), record.get("picture", list(USUAL_SIZE))
    sound = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
    if not sound or not _is_size(size):
        raise UserError(f"{path} is damaged: copy the checkpoint again")
    written = WrittenModel.open(directory, model_directory.load_processor(directory))
    try:
        found = last_hidden(written, _sample_of(written, size))
    except UserError:
        raise
    except Exception as fault:  # of other people's modules, about sizes that do not fit
        reason = " ".join(str(fault).split()).rstrip(".") or type(fault).__name__
        raise UserError(f"{directory} cannot be computed: {reason}") from None
    written.source.close()
    error = _distance(found[0][0, -1], torch.tensor(values)) if found else float("inf")
    if not error <= _ELSEWHERE:
        raise UserError(
            f"{directory} does not give what it gave when it was written: hidden states differ by "
            f"{error:.0%}. `qig-serve inspect --verify {directory}` names files that have changed; "
            "where none has, this version of transformers computes the model differently"
        )
    return error
