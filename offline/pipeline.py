"""The one loop of the offline stage. Reads from top to bottom.

    model directory -> samples -> for every decoder block:
        capture -> token weights -> equalization search -> fold -> round -> pack -> write
    -> report -> publish

Two streams of hidden states go through the decoder side by side, that of the original model and
that of the quantized prefix (streams.py). One block is resident at a time (twice: as it was and as
it becomes), and one batch of samples at a time passes it. Several processes (torchrun) share the
samples, see ranks.py: all go through this loop, and rank 0 writes.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve import __version__
from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.formats import FORMAT_VERSION, QuantScheme, unsupported_shape
from qig_serve.manifest import CalibrationInfo, QuantizationConfig
from qig_serve.offline import adapter, compressed_tensors
from qig_serve.offline.adapter import BlockInputs, LoadedModel
from qig_serve.offline.baselines import AnswerGradients, model_gradients
from qig_serve.offline.block import round_block
from qig_serve.offline.block_files import load_written, read_progress, write_block
from qig_serve.offline.calibration import (
    CalibrationBatch,
    calibration_sha256,
    load_samples,
    make_batches,
    token_counts,
)
from qig_serve.offline.capture import Store, check_finite
from qig_serve.offline.checkpoint import CheckpointWriter, ResumableError
from qig_serve.offline.disk import disk_errors
from qig_serve.offline.equalize import GroupResult, equalize_group
from qig_serve.offline.estimate import Estimate, dry_run, heaviest
from qig_serve.offline.pictured import PicturedWeights
from qig_serve.offline.placement import ACTIVATIONS, offload_folder, pick_device
from qig_serve.offline.progress import RunProgress, device_bytes, host_bytes
from qig_serve.offline.ranks import ALONE, Ranks, joined
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.report import write_reports
from qig_serve.offline.report_data import REPORT_FILE, BlockReport, QuantizationReport
from qig_serve.offline.streams import Streams
from qig_serve.offline.tensor_parallel import SIZES, refused_sizes
from qig_serve.samples import sample_sha256

LOG_FILE = "quantize.log"
"""The run's progress, in the hidden directory beside the output and then in the checkpoint."""


def quantize(
    model: Path | str,
    output: Path | str,
    recipe: QuantRecipe | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> QuantizationReport:
    """Quantizes a Hugging Face model directory and writes the checkpoint to `output`.

    The same recipe, samples, seed and number of processes give the same bytes. UserError, with
    nothing left behind, when model, data or recipe are wrong; an interrupted run goes on with
    `resume`. Under torchrun the processes share the samples, and all return the report.
    """
    require("matplotlib", "the report of a quantized model")
    recipe = recipe or QuantRecipe(calib="demo")
    if not recipe.quant_scheme.servable:
        raise UserError(f"{recipe.scheme} is for comparisons only: no server can load it")
    with joined() as ranks:
        return _quantize(Path(model), Path(output), recipe, ranks, resume, quiet)


def _quantize(
    model: Path, output: Path, recipe: QuantRecipe, ranks: Ranks, resume: bool, quiet: bool
) -> QuantizationReport:
    started = time.monotonic()
    if ranks.size > 1 and recipe.effort == "high":
        raise UserError("effort high learns on one batch at a time: run it in one process")
    torch.manual_seed(recipe.seed)
    device = pick_device(recipe.device, ranks)
    loaded = adapter.load(model, device=device)
    check_shapes(loaded, recipe.quant_scheme)
    samples = load_samples(
        recipe.calib, recipe.samples, recipe.seed, recipe.image_folder, recipe.text_only
    )
    batches = make_batches(
        samples,
        loaded.processor,
        loaded.image_token_id,
        batch_tokens=recipe.batch_tokens,
        max_length=recipe.max_length,
        ranks=ranks,
    )
    info = CalibrationInfo(
        source=recipe.calib,
        samples=len(samples),
        sha256=calibration_sha256(samples),
        seed=recipe.seed,
    )
    counts = token_counts(batches)
    tokens = dict(zip(counts, map(int, ranks.total(*counts.values())), strict=True))
    report = QuantizationReport(
        model=str(model),
        family=loaded.arch.name,
        scheme=recipe.scheme,
        method=recipe.method,
        recipe=recipe.recorded(),
        calibration={
            **info.model_dump(),
            "tokens": tokens,
            # So that an evaluation can tell which of its questions were calibrated on.
            "sample_sha256": [sample_sha256(s) for s in samples],
        },
        left_alone=loaded.left_alone(),
        producer=f"qig-serve {__version__}",
    )
    fingerprint = {
        "version": __version__,
        "model": loaded.source.fingerprint(),
        "data": info.sha256,
        "recipe": recipe.recorded(),
        "run": {"processes": ranks.size},  # sums depend on it in the last bits
    }
    with ExitStack() as stack:
        writer = None
        if ranks.writes:
            writer = CheckpointWriter(loaded.source, output, fingerprint, resume)
            stack.enter_context(writer)
        log = None if writer is None else writer.directory / LOG_FILE
        progress = stack.enter_context(
            RunProgress(loaded.num_blocks, device, quiet or not ranks.writes, log)
        )
        progress.line(
            f"calibration: {len(samples)} samples of {tokens['image']} image, {tokens['text']} "
            f"text and {tokens['special']} template tokens"
            + (f", shared by {ranks.size} processes" if ranks.size > 1 else "")
        )
        folder = stack.enter_context(offload_folder(recipe, writer, ranks))
        if not ranks.share(writer.finished if writer is not None else 0):
            estimate = look_ahead(loaded, recipe, batches, ranks, folder, progress)
            report.estimate = asdict(estimate)
        gradients = None
        if recipe.needs_model_gradients:
            progress.line(
                f"token weights by {recipe.token_weights} need a backward pass of the whole model, "
                "the only step that holds all of it in memory"
            )
            gradients = model_gradients(loaded, batches, ranks)
        own = {name for batch in batches for name in batch.ids}
        pictured = PicturedWeights.choose(
            [s for s in samples if s.id in own], batches, loaded.num_blocks
        )
        streams = first_streams(loaded, recipe, batches, folder, ranks)
        quantize_blocks(loaded, streams, gradients, writer, progress, report, pictured)
        ranks.agree()
        report.seconds = time.monotonic() - started
        if writer is not None:
            progress.line(
                f"all blocks done in {report.seconds:.0f} s, {len(report.fallbacks)} fallbacks"
            )
            progress.close_log()
            shutil.rmtree(writer.directory / ACTIVATIONS, ignore_errors=True)
            publish(loaded, writer, report, info, recipe, pictured)
            progress.line(f"wrote {output} in {time.monotonic() - started:.0f} s")
    return report


def look_ahead(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    batches: Sequence[CalibrationBatch],
    ranks: Ranks,
    folder: Path | None,
    progress: RunProgress,
) -> Estimate:
    """The dry run on the longest samples, and what the run will take, printed."""
    longest = heaviest(batches)[0]
    progress.line(
        f"dry run of one block on the longest sample, {longest.ids[0]}: "
        f"{longest.token_mask.shape[1]} tokens"
    )

    def streams(chosen: Sequence[CalibrationBatch], dry: QuantRecipe) -> Streams:
        return first_streams(loaded, dry, chosen, folder, ranks)

    estimate = dry_run(loaded, recipe, batches, streams)
    progress.line(estimate.line(loaded.num_blocks, loaded.device))
    return estimate


def check_shapes(loaded: LoadedModel, scheme: QuantScheme) -> None:
    """UserError that names the first linear whose size the scheme does not divide."""
    for index in range(loaded.num_blocks):
        for group in loaded.arch.groups:
            for name in group.linears:
                weight = loaded.source_name(index, f"{name}.weight")
                n, k = loaded.source.shape(weight)
                if reason := unsupported_shape(scheme, n, k):
                    raise UserError(f"{weight} cannot be quantized: {reason}")


def first_streams(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    batches: Sequence[CalibrationBatch],
    folder: Path | None,
    ranks: Ranks = ALONE,
) -> Streams:
    """Both streams before block 0: what embeddings, vision tower and projector make of samples."""
    loaded.model.to(loaded.device)
    inputs: list[BlockInputs] = []
    fp, quantized = Store(folder, "fp"), Store(folder, "quantized")
    for b, batch in enumerate(batches):
        before = loaded.block_inputs(batch.inputs)
        check_finite(before.hidden, f"input of layer 0, samples {', '.join(batch.ids)}")
        fp.put(b, before.hidden)
        quantized.put(b, before.hidden)
        inputs.append(replace(before, hidden=before.hidden[:0]))  # the stores keep it
    loaded.model.to("cpu")  # from here on the device holds one block
    return Streams(
        recipe, loaded.dtype, loaded.device, batches, inputs, fp, quantized, 0, folder, ranks
    )


def quantize_blocks(
    loaded: LoadedModel,
    streams: Streams,
    gradients: AnswerGradients | None,
    writer: CheckpointWriter | None,
    progress: RunProgress,
    report: QuantizationReport,
    pictured: PicturedWeights,
) -> None:
    """The loop over the decoder. Blocks that an interrupted run has written are only passed.

    `writer` is None in the processes that do not write.
    """
    ranks = streams.ranks
    first = ranks.share(writer.finished if writer is not None else 0)
    if first:
        if writer is not None:
            report.blocks, report.fallbacks = read_progress(writer, first)
        progress.line(f"going on after block {first}/{loaded.num_blocks}")
    for index in range(loaded.num_blocks):
        progress.block(index)
        started = time.monotonic()
        original = loaded.block(index)
        block = copy.deepcopy(original)
        where = f"layer {index}"
        if index < first:
            progress.step("passing", 0.0)
            if writer is not None:
                load_written(loaded, block, index, writer, streams.scheme)
            for parameter in block.parameters():
                ranks.spread(parameter.data)
            streams.advance(original, block, linears_of(loaded, block), where)
            continue

        results: list[GroupResult] = []
        groups = loaded.arch.groups
        searched = groups if streams.recipe.needs_groups else ()
        for i, group in enumerate(searched):
            progress.step(f"equalization of {group.name}", 0.75 * i / len(searched))
            results.append(equalize_group(block, group, streams, gradients, index))
            pictured.keep(index, group.name, results[-1].token_weights)
        progress.step("rounding", 0.75)
        tensors, rounding = round_block(
            block, original, loaded.arch.groups, results, streams, where
        )
        count_fallbacks(index, results, rounding, report, streams.recipe, progress)
        progress.step("advancing", 0.9)
        done = BlockReport(
            index=index,
            modules=[r.report for r in results],
            linears=rounding,
            output_error=streams.advance(original, block, linears_of(loaded, block), where),
            seconds=time.monotonic() - started,
            host_bytes=host_bytes(),
            device_bytes=device_bytes(streams.device),
        )
        report.blocks.append(done)
        if writer is not None:
            progress.step("writing", 0.98)
            # The report first: a block that is written counts as done, and is not reported again.
            writer.write_text(REPORT_FILE, report.model_dump_json())
            write_block(loaded, block, index, tensors, results, writer)
        ratio = [f"{m.name} {m.loss / max(m.loss_rtn, 1e-30):.2f}" for m in done.modules]
        complete = [f"{m.completeness:.1%}" for m in done.modules if m.completeness is not None]
        text = f"output error {done.output_error:.2e}"
        text += f", loss over RTN: {' '.join(ratio)}" if ratio else ""
        text += f", completeness {' '.join(complete)}" if complete else ""
        progress.block_done(text, first)


def count_fallbacks(
    index: int,
    results: Sequence[GroupResult],
    rounding: Mapping[str, Mapping[str, Any]],
    report: QuantizationReport,
    recipe: QuantRecipe,
    progress: RunProgress,
) -> None:
    """Prints and counts the steps of block `index` that took a simpler way.

    ResumableError at the first block that has any, unless the recipe allows them: blocks before
    it are kept, and the run can go on with permission.
    """
    found = [text for r in results for text in r.fallbacks]
    found += [
        f"layer {index}, {name}: {linear['damping_raised']} times the damping asked for, for the "
        "Hessian to be positive definite"
        for name, linear in rounding.items()
        if "damping_raised" in linear
    ]
    report.fallbacks += [text for text in found if text not in report.fallbacks]
    for text in found:
        progress.line(f"fallback {len(report.fallbacks)}: {text}")
    if found and not recipe.allow_fallbacks:
        raise ResumableError(
            f"{len(found)} steps fell back to a simpler way, the first: {found[0]}. Run again with "
            "--allow-fallbacks to accept that, and with --resume if a block was finished"
        )


def linears_of(loaded: LoadedModel, block: nn.Module) -> list[nn.Module]:
    """The quantized linears of a block."""
    return [block.get_submodule(n) for group in loaded.arch.groups for n in group.linears]


def publish(
    loaded: LoadedModel,
    writer: CheckpointWriter,
    report: QuantizationReport,
    info: CalibrationInfo,
    recipe: QuantRecipe,
    pictured: PicturedWeights,
) -> None:
    """Publishes the checkpoint with its reports."""
    scheme = recipe.quant_scheme
    refused = refused_sizes(loaded.config, scheme.k_multiple)
    config = QuantizationConfig(
        quant_method="qig",
        format_version=FORMAT_VERSION,
        scheme=scheme.name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        ignore=report.left_alone,
        model_type=loaded.config.model_type,
        architectures=loaded.config.architectures or [],
        method=recipe.method,
        produced_by=report.producer,
        calibration=info,
        tensor_parallel_sizes=[size for size in SIZES if size not in refused],
        recipe=recipe.recorded(),
        summary={
            **report.summary(),
            "tensor_parallel_refused": {str(size): why for size, why in refused.items()},
        },
    ).model_dump(mode="json")
    card = loaded.directory / "README.md"
    pictures = pictured.pictures(loaded.config, loaded.processor)
    report.warnings += pictured.unmapped
    with disk_errors(writer.directory):
        write_reports(report, writer.directory, config, card if card.is_file() else None, pictures)
    compressed = None
    if recipe.format == "compressed-tensors":
        compressed = compressed_tensors.quantization_config(loaded.arch, scheme, report.left_alone)
    writer.publish(config, compressed)
