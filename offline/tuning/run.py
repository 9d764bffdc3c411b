"""Tuning as a step of a run: once, after the last block, before the checkpoint is published."""

from __future__ import annotations

import time

from qig_serve.offline.checkpoint.canary import Canary
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.passes.capture import Store
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.progress import RunProgress
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.results import REPORT_FILE, QuantizationReport
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.tuning.scales import Tuning, tune


def tune_scales(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    streams: Streams,
    first: Store,
    writer: CheckpointWriter | None,
    progress: RunProgress,
    report: QuantizationReport,
) -> None:
    """Tunes the scales of all blocks, unless an interrupted run has; `first`: input of block 0."""
    if streams.ranks.broadcast_object(writer is not None and writer.is_tuned):
        progress.line("going on with the scales that are tuned")
        return
    started = time.monotonic()
    tuning = Tuning.of(loaded, writer, streams, first)
    found = tune(tuning, recipe.tuning_passes, recipe.seed, progress.tuning)
    report.tuning = found.model_copy(update={"seconds": time.monotonic() - started})
    progress.line(report.tuning.line())
    if found.kept:
        chosen = Canary.choose(streams)
        streams.quantized.put(chosen, tuning.forward([chosen], keep=False)[chosen])
    loaded.model.to("cpu")
    if writer is not None:
        writer.write_text(REPORT_FILE, report.model_dump_json())
        writer.write_tuned(tuning.scales() if found.kept else {})
