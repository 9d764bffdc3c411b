"""A finished block on its way into the checkpoint, and back out of it in a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load_file
from torch import nn

from qig_serve.formats import QuantScheme
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.results import REPORT_FILE, BlockReport, GroupResult, QuantizationReport
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.packing import unpack_linear


def write_block(
    loaded: LoadedModel,
    block: nn.Module,
    index: int,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
    results: Sequence[GroupResult],
    writer: CheckpointWriter,
) -> None:
    """Packed linears and the 16-bit parameters that folding changed, by their checkpoint names."""
    tensors = {
        loaded.source_name(index, f"{name}.{suffix}"): tensor
        for name, parts in packed.items()
        for suffix, tensor in parts.items()
    }
    parameters = dict(block.named_parameters())
    for name in sorted({name for r in results for name in r.changed}):
        source_name = loaded.source_name(index, name)
        tensors[source_name] = parameters[name].to(loaded.source.tensor(source_name).dtype)
    writer.write_block(
        index, tensors, [loaded.source_name(index, f"{name}.weight") for name in packed]
    )


def load_written(
    loaded: LoadedModel,
    block: nn.Module,
    index: int,
    writer: CheckpointWriter,
    scheme: QuantScheme,
) -> None:
    """Makes a block what a finished block of an interrupted run was, bit by bit."""
    linears, written = packed_linears(load_file(writer.block_file(index)))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            source_name = loaded.source_name(index, name)
            linear = source_name.removesuffix(".weight")
            if source_name in written:
                parameter.copy_(written[source_name])
            elif linear in linears and name.endswith(".weight"):
                parameter.copy_(unpack_linear(linears[linear], scheme))


def read_progress(writer: CheckpointWriter, first: int) -> tuple[list[BlockReport], list[str]]:
    """What an interrupted run reported about its finished blocks."""
    path = writer.directory / REPORT_FILE
    if not path.is_file():
        return [], []
    report = QuantizationReport.model_validate_json(path.read_text(encoding="utf-8"))
    return report.blocks[:first], report.fallbacks
