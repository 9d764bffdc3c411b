"""The one loop of the offline stage. Reads from top to bottom.

    model directory -> samples -> for every decoder block:
        capture -> token weights -> equalization search -> fold -> round -> pack -> write
    -> report -> publish

Two streams of hidden states go through the decoder side by side, that of the original model and
that of the quantized prefix (streams.py). One block is resident at a time (twice: as it was and as
it becomes), and one batch of samples at a time passes it.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from qig_serve import __version__
from qig_serve.errors import UserError
from qig_serve.formats import FORMAT_VERSION, QuantScheme, unsupported_shape
from qig_serve.manifest import CalibrationInfo, QuantizationConfig
from qig_serve.offline import adapter, compressed_tensors
from qig_serve.offline.adapter import BlockInputs, LoadedModel
from qig_serve.offline.baselines import AnswerGradients, model_gradients
from qig_serve.offline.block import round_block
from qig_serve.offline.calibration import (
    CalibrationBatch,
    calibration_sha256,
    load_samples,
    make_batches,
    token_counts,
)
from qig_serve.offline.capture import Store, check_finite
from qig_serve.offline.checkpoint import CheckpointWriter, tensor_parallel_sizes
from qig_serve.offline.equalize import GroupResult, equalize_group
from qig_serve.offline.pictured import PicturedWeights
from qig_serve.offline.progress import RunProgress, device_bytes, host_bytes
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.report import write_reports
from qig_serve.offline.report_data import REPORT_FILE, BlockReport, QuantizationReport
from qig_serve.offline.streams import Streams
from qig_serve.packing import unpack_linear
from qig_serve.samples import sample_sha256


def quantize(
    model: Path | str,
    output: Path | str,
    recipe: QuantRecipe | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> QuantizationReport:
    """Quantizes a Hugging Face model directory and writes the checkpoint to `output`.

    The same recipe, samples and seed give the same bytes. UserError, with nothing left behind,
    when model, data or recipe are wrong; an interrupted run goes on with `resume`.
    """
    recipe = recipe or QuantRecipe(calib="demo")
    started = time.monotonic()
    if not recipe.quant_scheme.servable:
        raise UserError(f"{recipe.scheme} is for comparisons only: no server can load it")
    torch.manual_seed(recipe.seed)
    device = pick_device(recipe.device)
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
    )
    info = CalibrationInfo(
        source=recipe.calib,
        samples=len(samples),
        sha256=calibration_sha256(samples),
        seed=recipe.seed,
    )
    report = QuantizationReport(
        model=str(model),
        family=loaded.arch.name,
        scheme=recipe.scheme,
        method=recipe.method,
        recipe=recipe.recorded(),
        calibration={
            **info.model_dump(),
            "tokens": token_counts(batches),
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
    }
    with ExitStack() as stack:
        writer = stack.enter_context(CheckpointWriter(loaded.source, output, fingerprint, resume))
        progress = stack.enter_context(RunProgress(loaded.num_blocks, device, quiet))
        gradients = None
        if recipe.token_weights in ("modality", "gradient"):
            progress.line("a backward pass of the whole model, for gradients of the answer loss")
            gradients = model_gradients(loaded, batches)
        pictured = PicturedWeights.choose(samples, batches, loaded.num_blocks)
        with offload_folder(recipe, writer) as folder:
            streams = first_streams(loaded, recipe, batches, folder)
            quantize_blocks(loaded, streams, gradients, writer, progress, report, pictured)
        report.seconds = time.monotonic() - started
        publish(loaded, writer, report, info, recipe, pictured)
        progress.line(f"wrote {output} in {report.seconds:.0f} s")
    return report


@contextmanager
def offload_folder(recipe: QuantRecipe, writer: CheckpointWriter) -> Iterator[Path | None]:
    """Where activations wait with `offload` disk; gone before the checkpoint is published."""
    folder = writer.directory / "activations"
    shutil.rmtree(folder, ignore_errors=True)  # a killed run leaves its own
    if recipe.offload == "ram":
        yield None
        return
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def pick_device(name: str) -> torch.device:
    """The device of a recipe; "auto" is a GPU if there is one. UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


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
) -> Streams:
    """Both streams before block 0: what embeddings, vision tower and projector make of samples."""
    inputs: list[BlockInputs] = []
    fp, quantized = Store(folder, "fp"), Store(folder, "quantized")
    for b, batch in enumerate(batches):
        before = loaded.block_inputs(batch.inputs)
        check_finite(before.hidden, f"input of layer 0, samples {', '.join(batch.ids)}")
        fp.put(b, before.hidden)
        quantized.put(b, before.hidden)
        inputs.append(replace(before, hidden=before.hidden[:0]))  # the stores keep it
    loaded.model.to("cpu")  # from here on the device holds one block
    return Streams(recipe, loaded.dtype, loaded.device, batches, inputs, fp, quantized, 0, folder)


def quantize_blocks(
    loaded: LoadedModel,
    streams: Streams,
    gradients: AnswerGradients | None,
    writer: CheckpointWriter,
    progress: RunProgress,
    report: QuantizationReport,
    pictured: PicturedWeights,
) -> None:
    """The loop over the decoder. Blocks that an interrupted run has written are only passed."""
    first = writer.finished
    if first:
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
            load_written(loaded, block, index, writer, streams.scheme)
            streams.advance(original, block, linears_of(loaded, block), where)
            continue

        results: list[GroupResult] = []
        groups = loaded.arch.groups
        searched = groups if needs_groups(streams.recipe) else ()
        for i, group in enumerate(searched):
            progress.step(f"equalization of {group.name}", 0.75 * i / len(searched))
            results.append(equalize_group(block, group, streams, gradients, index))
            pictured.keep(index, group.name, results[-1].token_weights)
        progress.step("rounding", 0.75)
        tensors, rounding = round_block(
            block, original, loaded.arch.groups, results, streams, where
        )
        progress.step("writing", 0.9)
        write_block(loaded, block, index, tensors, results, writer)
        progress.step("advancing", 0.92)
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
        report.fallbacks += [text for r in results for text in r.fallbacks]
        writer.write_text(REPORT_FILE, report.model_dump_json())
        ratio = [f"{m.name} {m.loss / max(m.loss_rtn, 1e-30):.2f}" for m in done.modules]
        complete = [f"{m.completeness:.1%}" for m in done.modules if m.completeness is not None]
        text = f"output error {done.output_error:.2e}"
        text += f", loss over RTN: {' '.join(ratio)}" if ratio else ""
        text += f", completeness {' '.join(complete)}" if complete else ""
        progress.block_done(text, first)


def needs_groups(recipe: QuantRecipe) -> bool:
    """Whether anything is searched or weighed: round-to-nearest alone needs no activations."""
    return recipe.equalize != "none" or recipe.token_weights != "uniform"


def linears_of(loaded: LoadedModel, block: nn.Module) -> list[nn.Module]:
    """The quantized linears of a block."""
    return [block.get_submodule(n) for group in loaded.arch.groups for n in group.linears]


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
    written = load_file(writer.block_file(index))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            source_name = loaded.source_name(index, name)
            stem = source_name.removesuffix(".weight")
            tensors = {
                n.removeprefix(f"{stem}."): t
                for n, t in written.items()
                if n.startswith(f"{stem}.weight_")
            }
            if source_name in written:
                parameter.copy_(written[source_name])
            elif tensors and name.endswith(".weight"):
                parameter.copy_(unpack_linear(tensors, scheme))


def read_progress(writer: CheckpointWriter, first: int) -> tuple[list[BlockReport], list[str]]:
    """What an interrupted run reported about its finished blocks."""
    path = writer.directory / REPORT_FILE
    if not path.is_file():
        return [], []
    report = QuantizationReport.model_validate_json(path.read_text(encoding="utf-8"))
    return report.blocks[:first], report.fallbacks


def publish(
    loaded: LoadedModel,
    writer: CheckpointWriter,
    report: QuantizationReport,
    info: CalibrationInfo,
    recipe: QuantRecipe,
    pictured: PicturedWeights,
) -> None:
    """Refuses silent fallbacks, then publishes the checkpoint with its reports."""
    if report.fallbacks and not recipe.allow_fallbacks:
        raise UserError(
            f"{len(report.fallbacks)} steps fell back to a simpler way, the first: "
            f"{report.fallbacks[0]}. Run again with --allow-fallbacks to accept that"
        )
    scheme = recipe.quant_scheme
    config = QuantizationConfig(
        quant_method="qig",
        format_version=FORMAT_VERSION,
        scheme=scheme.name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        ignore=report.left_alone,
        method=recipe.method,
        produced_by=report.producer,
        calibration=info,
        tensor_parallel_sizes=tensor_parallel_sizes(loaded.text_config, scheme.k_multiple),
        recipe=recipe.recorded(),
        summary=report.summary(),
    ).model_dump(mode="json")
    card = loaded.directory / "README.md"
    pictures = pictured.pictures(loaded.config, loaded.processor)
    report.warnings += pictured.unmapped
    write_reports(
        report,
        writer.directory,
        config,
        card if card.is_file() else None,
        pictures,
    )
    compressed = None
    if recipe.format == "compressed-tensors":
        compressed = compressed_tensors.quantization_config(loaded.arch, scheme, report.left_alone)
    writer.publish(config, compressed)
