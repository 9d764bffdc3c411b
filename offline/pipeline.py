"""The one loop of the offline stage. Reads from top to bottom.

    model directory -> samples -> for every decoder block:
        capture -> token weights -> equalization search -> fold -> round -> pack -> write
    -> tune all scales -> report -> publish

Two streams of hidden states go through the decoder side by side, that of the original model and
that of the quantized prefix (passes/streams.py). One block is resident at a time (twice: as it was
and as it becomes), and one batch of samples at a time passes it. Several processes (torchrun) share
the samples, see processes.py: all go through this loop, and rank 0 writes.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.formats import QuantScheme, unsupported_shape
from qig_serve.model_directory import context_length, find_model
from qig_serve.offline.calibration.batches import CalibrationBatch, make_batches
from qig_serve.offline.calibration.sources import load_calibration
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.checkpoint.blocks import load_written, read_progress, write_block
from qig_serve.offline.checkpoint.canary import Canary
from qig_serve.offline.checkpoint.writer import CheckpointWriter, check_target
from qig_serve.offline.disk import ResumableError
from qig_serve.offline.equalization.block import equalize_block
from qig_serve.offline.estimate import Estimate, dry_run, heaviest
from qig_serve.offline.importance.gradients import AnswerGradients, model_gradients
from qig_serve.offline.passes import output_gradients
from qig_serve.offline.passes.capture import Store, check_finite, within_range
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.placement import ACTIVATIONS, offload_folder, pick_device
from qig_serve.offline.processes import ALONE, Ranks, joined
from qig_serve.offline.progress import RunProgress, device_bytes, duration, host_bytes, waiting
from qig_serve.offline.publish import fingerprint, new_report, publish
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.report.pictures import KeptWeights
from qig_serve.offline.results import (
    REPORT_FILE,
    BlockReport,
    GroupResult,
    LinearReport,
    QuantizationReport,
)
from qig_serve.offline.rounding.block import round_block
from qig_serve.offline.rounding.columns import slow_rounding
from qig_serve.offline.source import loaded_model, mlp_width
from qig_serve.offline.source.loaded_model import BlockInputs, LoadedModel
from qig_serve.offline.source.vocabulary import in_eight_bits, rounded_inputs
from qig_serve.offline.tuning.run import tune_scales
from qig_serve.offline.tuning.scales import STEP_SAMPLES

LOG_FILE = "quantize.log"
"""The run's progress, in the hidden directory beside the output and then in the checkpoint."""


def quantize(
    model: Path | str,
    output: Path | str,
    recipe: QuantRecipe,
    *,
    resume: bool = False,
    quiet: bool = False,
    plain: bool = False,
) -> QuantizationReport:
    """Quantizes a Hugging Face model and writes the checkpoint to `output`.

    `model` is its directory, or its org/name where the hub's local cache has it.

    The same recipe, samples, seed and number of processes give the same bytes. UserError, with
    nothing left behind, when model, data or recipe are wrong; an interrupted run goes on with
    `resume`. Under torchrun the processes share the samples, and all return the report.

    `plain` writes an ordinary model instead, of the weights that the codes stand for: for
    comparisons, any weight-only scheme, those without a kernel included (checkpoint/forms.py).
    """
    scheme = recipe.quant_scheme
    if plain and scheme.activation_bits is not None:
        raise UserError(f"{scheme.name} quantizes activations: ordinary weights cannot do that")
    if not plain:
        require("matplotlib", "the report of a quantized model")
    if not plain and not scheme.servable:
        raise UserError(f"{scheme.name} is for comparisons only: no server can load it")
    with joined() as ranks:
        if ranks.writes:
            check_target(Path(output), resume)  # a large model takes minutes to load
        return _quantize(find_model(model), Path(output), recipe, ranks, resume, quiet, plain)


def _quantize(
    model: Path,
    output: Path,
    recipe: QuantRecipe,
    ranks: Ranks,
    resume: bool,
    quiet: bool,
    plain: bool,
) -> QuantizationReport:
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    device = pick_device(recipe.device, ranks)
    with waiting("reading the model and the samples", quiet or not ranks.writes):
        loaded = loaded_model.load(model, device=device)
        check_shapes(loaded, recipe.quant_scheme, recipe.format)
        note = choose_vocabulary(loaded, recipe, plain)
        slow = slow_rounding(device) if recipe.rounding_method.damping is not None else ""
        notes = [line for line in (note, slow) if line]
        width = choose_mlp_width(loaded, recipe, plain)
        samples = load_calibration(
            recipe.calib, recipe.samples, recipe.seed, recipe.image_folder, recipe.text_only, notes
        )
        batches = make_batches(
            samples,
            loaded.processor,
            loaded.image_token_id,
            batch_tokens=recipe.batch_tokens,
            max_length=recipe.max_length,
            context=context_length(loaded.text_config),
            most=STEP_SAMPLES if recipe.tuning_passes else None,
            ranks=ranks,
        )
    report = new_report(loaded, recipe, samples, batches, ranks)
    report.warnings += notes
    identity = fingerprint(loaded, report, ranks, plain)
    ranks.agree(identity)
    with ExitStack() as stack:
        writer = None
        if ranks.writes:
            writer = CheckpointWriter(loaded.source, output, identity, resume)
            stack.enter_context(writer)
        log = None if writer is None else writer.directory / LOG_FILE
        progress = stack.enter_context(
            RunProgress(loaded.num_blocks, device, quiet or not ranks.writes, log)
        )
        eight = f"in 8 bits: {', '.join(loaded.eight_bit)}" if loaded.eight_bit else ""
        calibration = report.calibration_line(ranks.size)
        for line in (*notes, eight, loaded.left_out_line, width, calibration):
            if line:
                progress.line(line)
        on_disk, beside = recipe.offload == "disk", None if writer is None else writer.directory
        folder = stack.enter_context(offload_folder(on_disk, beside, ranks))
        done = ranks.broadcast_object(writer.finished if writer is not None else 0)
        if not done:
            estimate = look_ahead(loaded, recipe, batches, ranks, folder, progress)
            report.estimate = asdict(estimate)
        gradients = None
        if recipe.needs_model_gradients:
            progress.line(
                f"token weights by {recipe.token_weights} need a backward pass of the whole model, "
                "the only step that holds all of it in memory"
            )
            gradients = model_gradients(loaded, batches, ranks)
        kept = KeptWeights.choose(samples, batches, loaded.num_blocks)
        streams = first_streams(loaded, recipe, batches, folder, ranks)
        first = streams.quantized.copy("first") if recipe.tuning_passes else None
        if recipe.rounding_method.outputs and done < loaded.num_blocks:
            progress.line("the answers' gradients: a sweep over all blocks, and back")
            streams.output_gradients = output_gradients.prepare(
                loaded, streams, recipe.seed, done, progress.beside_blocks
            )
            report.sweep_seconds = streams.output_gradients.seconds
        quantize_blocks(loaded, recipe, streams, gradients, writer, progress, report, kept, done)
        if first is not None:
            tune_scales(loaded, recipe, streams, first, writer, progress, report)
        ranks.barrier()
        report.seconds = time.monotonic() - started
        if writer is not None:
            count = len(report.fallbacks)
            progress.line("all blocks done" + (f", with {count} fallbacks" if count else ""))
            progress.close_log()
            progress.beside_blocks("writing and reading back")
            canary = Canary.of(loaded, streams)
            shutil.rmtree(writer.directory / ACTIVATIONS, ignore_errors=True)
            publish(loaded, writer, report, recipe, kept, canary, plain)
            took = duration(time.monotonic() - started)
            progress.line(": ".join(filter(None, (f"wrote {output} in {took}", report.size()))))
    return report


def choose_vocabulary(loaded: LoadedModel, recipe: QuantRecipe, plain: bool) -> str:
    """Decides whether output head and embedding are stored in 8 bits; why one is not."""
    if plain or 8 not in (recipe.head, recipe.embeddings):
        return ""
    if recipe.format != "qig":
        return f"{recipe.format}: output head and embedding stay in 16 bits"
    loaded.eight_bit, note = in_eight_bits(loaded, recipe.head, recipe.embeddings)
    return note


def choose_mlp_width(loaded: LoadedModel, recipe: QuantRecipe, plain: bool) -> str:
    """Decides whether the MLP is stored with channels of zeros; what to say about it."""
    if plain:
        return ""
    loaded.mlp_padding, note = mlp_width.choose(loaded, recipe.quant_scheme, recipe.pad_mlp)
    return note if loaded.mlp_padding is None else loaded.mlp_padding.sentence()


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

    def streams(chosen: Sequence[CalibrationBatch]) -> Streams:
        return first_streams(loaded, recipe, chosen, folder, ranks)

    estimate = dry_run(loaded, recipe, batches, streams)
    progress.line(estimate.line(loaded.num_blocks, loaded.device))
    return estimate


def check_shapes(loaded: LoadedModel, scheme: QuantScheme, form: str = "qig") -> None:
    """UserError that names the first linear whose size the scheme, or the form, cannot store."""
    if form == "compressed-tensors" and loaded.has_experts:
        raise UserError(
            f"{loaded.directory} has experts, which are not written as compressed-tensors: leave "
            "--format out"
        )
    for index in range(loaded.num_blocks):
        groups = loaded.groups(loaded.meta_block(index))
        for name in (name for group in groups for name in group.linears):
            weight = loaded.source_name(index, f"{name}.weight")
            n, k = loaded.source.shape(weight)
            reason = unsupported_shape(scheme, n, k)
            if not reason and form == "compressed-tensors":
                reason = compressed_tensors.unsupported_shape(scheme, k)
            if reason:
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
    rounded: list[BlockInputs] = []
    fp, quantized = Store(folder, "fp"), Store(folder, "quantized")
    large = Store(folder, "large")
    for b, batch in enumerate(batches):
        where = f"input of layer 0, samples {', '.join(batch.ids)}"
        with within_range(loaded.model, loaded.dtype, where):
            before = loaded.block_inputs(batch.inputs)
        check_finite(before.hidden, where)
        after_rounding = rounded_inputs(loaded, batch.inputs, before)
        fp.put(b, before.hidden)
        quantized.put(b, after_rounding.hidden)
        put = large.adder()  # what both have is kept once
        inputs.append(before.put_away(put))
        rounded.append(after_rounding.put_away(put))
    loaded.model.to("cpu")  # from here on the device holds one block
    return Streams(
        recipe.quant_scheme,
        loaded.dtype,
        loaded.device,
        recipe.batch_tokens,
        batches,
        inputs,
        rounded,
        fp,
        quantized,
        folder=folder,
        ranks=ranks,
    )


def quantize_blocks(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    streams: Streams,
    gradients: AnswerGradients | None,
    writer: CheckpointWriter | None,
    progress: RunProgress,
    report: QuantizationReport,
    kept: KeptWeights,
    first: int,
) -> None:
    """The loop over the decoder. Those before block `first` are written, and are only passed.

    `writer` is None in the processes that do not write.
    """
    if first:
        if writer is not None:
            read_progress(writer, first, report)
        progress.line(f"going on after block {first}/{loaded.num_blocks}")
    for index in range(loaded.num_blocks):
        progress.block(index)
        started = time.monotonic()
        original = loaded.block(index)
        block = copy.deepcopy(original)
        where = f"layer {index}"
        groups, linears = loaded.groups(block), loaded.linears(block)
        if index < first:
            progress.step("passing", 0.0)
            if writer is not None:
                load_written(loaded, block, index, writer.block(index), streams.scheme)
            for parameter in block.parameters():
                streams.ranks.broadcast(parameter.data)
            streams.advance(original, block, linears, where)
            continue

        results: list[GroupResult] = []
        if recipe.needs_groups:
            for part, name in equalize_block(
                block, groups, streams, recipe.equalization, gradients, index, results
            ):
                progress.step(f"equalization of {name}", 0.75 * part)
            for group, result in zip(groups, results, strict=True):
                if group.expert is None:
                    kept.keep(index, group.name, result.token_weights)
        progress.step("rounding", 0.75)
        rounding = round_block(
            block, original, groups, results, streams, recipe.rounding_method, where
        )
        count_fallbacks(index, results, rounding.reports, report, recipe, progress)
        progress.step("advancing", 0.9)
        equalized = next((r.experts for r in results if r.experts), None)
        done = BlockReport(
            index=index,
            modules=[r.report for r in results if r.report is not None],
            linears=rounding.reports,
            experts=rounding.experts or equalized,
            output_error=streams.advance(original, block, linears, where),
            seconds=time.monotonic() - started,
            host_bytes=host_bytes(),
            device_bytes=device_bytes(streams.device),
        )
        report.blocks.append(done)
        if writer is not None:
            progress.step("writing", 0.98)
            # The report first: a block that is written counts as done, and is not reported again.
            writer.write_text(REPORT_FILE, report.model_dump_json())
            write_block(loaded, block, index, rounding.tensors, results, writer, streams.scheme)
        progress.block_done(done.line(), first)


def count_fallbacks(
    index: int,
    results: Sequence[GroupResult],
    rounding: Mapping[str, LinearReport],
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
        f"layer {index}, {name}: {linear.damping_raised} times the damping of the method, for the "
        "Hessian to be positive definite"
        for name, linear in rounding.items()
        if linear.damping_raised is not None
    ]
    report.fallbacks += [text for text in found if text not in report.fallbacks]
    for text in found:
        progress.line(f"fallback {len(report.fallbacks)}: {text}")
    if found and not recipe.allow_fallbacks:
        raise ResumableError(
            f"{len(found)} steps fell back to a simpler way, the first: {found[0]}. Run again with "
            "--allow-fallbacks to accept that, and with --resume if a block was finished"
        )
