"""A finished block on its way into the checkpoint, and back out of it in a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import ValidationError
from torch import nn

from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.results import REPORT_FILE, GroupResult, QuantizationReport
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.packing import unpack_linear


def write_block(
    loaded: LoadedModel,
    block: nn.Module,
    index: int,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
    results: Sequence[GroupResult],
    writer: CheckpointWriter,
    scheme: QuantScheme,
) -> None:
    """Packed linears and the 16-bit parameters that change, by their checkpoint names.

    Those that folding changed, and the biases of an MLP that is stored wider.
    """
    padding = loaded.mlp_padding
    tensors = {
        loaded.source_name(index, f"{name}.{suffix}"): tensor
        for name, parts in packed.items()
        for suffix, tensor in (padding.packed(name, parts, scheme) if padding else parts).items()
    }
    parameters = dict(block.named_parameters())
    changed = {name for r in results for name in r.changed}
    wider = {f"{name}.bias" for name in padding.rows} & parameters.keys() if padding else set()
    for name in sorted(changed | wider):
        source_name = loaded.source_name(index, name)
        value = parameters[name].to(loaded.source.tensor(source_name).dtype)
        tensors[source_name] = padding.wider(value) if padding and name in wider else value
    writer.write_block(
        index, tensors, [loaded.source_name(index, f"{name}.weight") for name in packed]
    )


def load_written(
    loaded: LoadedModel,
    block: nn.Module,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    scheme: QuantScheme,
) -> None:
    """Makes a block what a finished block was, bit by bit; `tensors` are those of its shard."""
    linears, written = packed_linears(tensors)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            source_name = loaded.source_name(index, name)
            linear = source_name.removesuffix(".weight")
            if source_name in written:
                value = written[source_name]
            elif linear in linears and name.endswith(".weight"):
                value = unpack_linear(linears[linear], scheme)
            else:
                continue
            if loaded.mlp_padding is not None:
                value = loaded.mlp_padding.narrower(name.rpartition(".")[0], value)
            parameter.copy_(value)


def read_progress(writer: CheckpointWriter, first: int, report: QuantizationReport) -> None:
    """Puts what an interrupted run reported about its finished blocks into `report`."""
    path = writer.directory / REPORT_FILE
    if not path.is_file():
        return
    try:
        before = QuantizationReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise UserError(
            f"{path} is damaged or of another version of qig-serve: remove {path.parent} and start "
            "again without --resume"
        ) from None
    report.blocks, report.fallbacks = before.blocks[:first], before.fallbacks
    report.tuning = before.tuning if writer.is_tuned else None
