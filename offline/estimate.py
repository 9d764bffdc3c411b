"""Before hours of work: a dry run of one block on the longest samples, and an estimate from it.

The dry run does all that a block is put through, once, on the samples that are longest and on
those that make the fullest batch, with two exponents instead of the whole grid. It ends in a
sentence where memory does not suffice or an input is wrong; its times and peaks, scaled to all
samples and blocks, are the estimate.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qig_serve.errors import UserError
from qig_serve.family_row import SmoothingGroup
from qig_serve.manifest import PER_BLOCK
from qig_serve.offline.calibration.batches import TEXT, CalibrationBatch
from qig_serve.offline.equalization.block import equalize_block
from qig_serve.offline.passes import output_gradients
from qig_serve.offline.passes.capture import quantized_weights
from qig_serve.offline.passes.parts import inner_names
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.progress import device_bytes, duration, gibibytes, host_bytes
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.results import GroupResult
from qig_serve.offline.rounding.block import round_block
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.source.mlp_width import block_weights, decoder_weights
from qig_serve.offline.source.stand_ins import out_of_memory
from qig_serve.offline.source.vocabulary import has_in_8_bits
from qig_serve.offline.tuning.scales import STEP_SAMPLES, STEP_TOKENS

_DRY_GRID = 2
_PASSES_TO_TUNE = 5
"""Forward passes of a block that a pass of tuning costs: two, and a backward for both factors."""
_PASSES_AT_THE_HEAD = 5
"""The same of the output head: full precision, quantized, back, and softmax of both."""
_PASSES_TO_DRAW = 2
"""Of the output head: the mean prediction is its softmax."""
_PASSES_OF_A_DRAW = 4
"""Drawing, forward and back."""
COPIES = 10
"""Of a linear's second moments [K, K] in fp32: what is held while it is rounded."""
FirstStreams = Callable[[Sequence[CalibrationBatch]], Streams]
"""Runs what comes before the decoder on some batches."""


@dataclass
class BlockSeconds:
    """Wall time of one block: what grows with the tokens that pass it, and what does not."""

    capture: float = 0.0
    token_weights: float = 0.0
    search: float = 0.0
    """Forward passes of all exponents of the recipe's grid."""
    statistics: float = 0.0
    outputs: float = 0.0
    """Gradients at the outputs of its linears."""
    advance: float = 0.0
    load: float = 0.0
    candidates: float = 0.0
    """Quantizing the weights for every exponent."""
    rounding: float = 0.0
    """With moving the scales of single channels."""

    @property
    def per_token(self) -> float:
        """What is in proportion to the tokens of the samples."""
        passes = self.capture + self.token_weights + self.search + self.statistics
        return passes + self.outputs + self.advance

    @property
    def fixed(self) -> float:
        """What is not."""
        return self.load + self.candidates + self.rounding

    def scaled(self, factor: float) -> float:
        """One block with `factor` times the tokens."""
        return self.per_token * factor + self.fixed


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    seconds: float
    host_bytes: int
    """Peak resident memory."""
    disk_bytes: int
    """Activations on disk; 0 with `offload` ram."""
    device_bytes: int
    """Peak memory allocated on the GPU; 0 on a CPU."""

    def line(self, blocks: int, device: torch.device) -> str:
        """For people."""
        text = f"estimate: about {duration(self.seconds)} for {blocks} blocks"
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        text += f", {gibibytes(self.host_bytes)} of {gibibytes(total)} host memory"
        if self.host_bytes > total:
            text += " (too much: use --offload disk)"
        if self.disk_bytes:
            text += f", {gibibytes(self.disk_bytes)} of disk beside the output"
        if device.type == "cuda":
            present = torch.cuda.get_device_properties(device).total_memory
            text += f", {gibibytes(self.device_bytes)} of {gibibytes(present)} device memory"
        return text


def heaviest(batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
    """The batch of the longest sample, and the one with most tokens if that is another."""
    longest = max(batches, key=lambda b: b.token_mask.shape[1])
    fullest = max(batches, key=lambda b: b.token_mask.numel())
    if fullest.token_mask.numel() == longest.token_mask.numel():
        return [longest]
    return [longest, fullest]


def dry_run(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    batches: Sequence[CalibrationBatch],
    first_streams: FirstStreams,
) -> Estimate:
    """One block on the heaviest batches; UserError where memory or an input does not do.

    Gradients of the whole model are left out of it, and of the estimate.
    """
    chosen = heaviest(batches)
    tokens = sum(b.token_mask.numel() for b in chosen)
    try:
        started = _now(loaded.device)
        dry = recipe.model_copy(
            update={
                "grid": min(recipe.grid, _DRY_GRID),
                "token_weights": "uniform"
                if recipe.needs_model_gradients
                else recipe.token_weights,
            }
        )
        everything = sum(b.token_mask.numel() for b in batches)
        # An expert is as rare as it will be.
        streams = replace(first_streams(chosen), share=tokens / everything)
        before = _now(loaded.device) - started
        followed = 0.0
        if recipe.rounding_method.outputs:
            streams.output_gradients, followed = output_gradients.stand_in(loaded, streams, batches)
        seconds = time_block(loaded, streams, dry, recipe.candidates)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"the dry run on calibration sample {chosen[0].ids[0]} "
            f"({chosen[0].token_mask.shape[1]} tokens) ran out of memory on {loaded.device}: lower "
            f"--batch-tokens (now {recipe.batch_tokens}) or --max-length, or use smaller images"
            + widest_linear(loaded, recipe)
        ) from None
    factor = everything / tokens
    waiting = everything * bytes_per_token(loaded, recipe)
    on_disk = recipe.offload == "disk"
    other = 0.0
    # Some families' blocks are not all of one size.
    blocks = decoder_weights(loaded) / block_weights(loaded, timed_block(loaded))
    if streams.output_gradients is not None:
        draws = streams.output_gradients.draws
        waiting += round(everything * followed) * draws * output_gradients.bytes_per_token(loaded)
        seconds.outputs *= followed
        # The sweeps: a pass forward, and back what each block is put through once more.
        other += blocks * factor * (followed * seconds.advance / 2 + seconds.outputs)
        answers = sum(int(output_gradients.said(b).sum()) for b in batches) * followed
        passes = _PASSES_TO_DRAW + draws * _PASSES_OF_A_DRAW
        other += passes * answers * seconds_per_token_at_the_head(loaded)
    if recipe.tuning_passes:
        a_pass = _PASSES_TO_TUNE / 2 * seconds.advance * factor * blocks
        other += recipe.tuning_passes * (a_pass + seconds_at_the_head(loaded, batches))
    return Estimate(
        seconds=before * factor + blocks * seconds.scaled(factor) + other,
        host_bytes=host_bytes() + (0 if on_disk else waiting),
        disk_bytes=waiting if on_disk else 0,
        device_bytes=device_bytes(loaded.device),
    )


def widest_linear(loaded: LoadedModel, recipe: QuantRecipe) -> str:
    """What rounding takes however few the tokens are, as the end of a sentence; maybe empty."""
    if recipe.rounding_method.damping is None:
        return ""
    block = loaded.meta_block(timed_block(loaded))
    names = [name for group in loaded.groups(block) for name in group.linears]
    k = max(block.get_submodule(name).in_features for name in names)
    size = gibibytes(4 * k * k * COPIES)
    return f"; second moments of the {k} inputs of its widest linear take up to {size} in any case"


def timed_block(loaded: LoadedModel) -> int:
    """The block that stands for all: the first with experts if any has, as most have them then."""
    if not loaded.has_experts:
        return 0
    return next(
        index
        for index in range(loaded.num_blocks)
        if any(g.expert is not None for g in loaded.groups(loaded.meta_block(index)))
    )


def time_block(
    loaded: LoadedModel, streams: Streams, recipe: QuantRecipe, candidates: int
) -> BlockSeconds:
    """Puts a block through everything; the search is scaled to `candidates` choices of scales.

    On what block 0 reads.
    """
    device, seconds = loaded.device, BlockSeconds()
    started = _now(device)
    original = loaded.block(timed_block(loaded))
    block = copy.deepcopy(original)
    seconds.load = _now(device) - started
    results: list[GroupResult] = []
    groups = loaded.groups(block)
    if recipe.needs_groups:
        once = [_seconds_to_round(block, group, streams) for group in groups]
        for _ in equalize_block(block, groups, streams, recipe.equalization, None, 0, results):
            pass
        common = sum(group.expert is None for group in groups)
        once[common:] = [sum(once[common:])]  # of experts there is one report
        reports = [result.report for result in results if result.report is not None]
        for report, quantizing in zip(reports, once, strict=False):
            seconds.capture += report.seconds["capture"]
            seconds.token_weights += report.seconds.get("token_weights", 0.0)
            seconds.rounding += report.seconds["channels"]
            forward = max(0.0, report.seconds["search"] / len(report.losses) - quantizing)
            seconds.search += candidates * forward
            seconds.candidates += candidates * quantizing
    parts: dict[str, float] = {}
    started = _now(device)
    method = recipe.rounding_method
    round_block(block, original, groups, results, streams, method, "layer 0", parts)
    seconds.statistics = parts.get("statistics", 0.0)
    seconds.outputs = parts.get("outputs", 0.0)
    seconds.rounding += _now(device) - started - seconds.statistics - seconds.outputs
    started = _now(device)
    streams.advance(original, block, loaded.linears(block), "layer 0")
    seconds.advance = _now(device) - started
    return seconds


def _seconds_to_round(block: nn.Module, group: SmoothingGroup, streams: Streams) -> float:
    """What a candidate costs before any token has passed: quantizing a group's weights."""
    started = _now(streams.device)
    module = block.get_submodule(group.loss_module)
    quantized_weights(module, inner_names(group), None, streams.scheme, streams.dtype)
    return _now(streams.device) - started


@torch.no_grad()
def seconds_per_token_at_the_head(loaded: LoadedModel) -> float:
    """From one call of the output head."""
    rows = loaded.rows_at_once
    loaded.model.to(loaded.device)
    hidden = torch.zeros(rows, loaded.text_config.hidden_size, device=loaded.device)
    started = _now(loaded.device)
    loaded.logits(hidden)
    once = _now(loaded.device) - started
    loaded.model.to("cpu")
    return once / rows


def seconds_at_the_head(loaded: LoadedModel, batches: Sequence[CalibrationBatch]) -> float:
    """What a pass of tuning spends behind the last block."""
    text = sum(int((b.modality == TEXT).sum()) for b in batches)
    steps = -(-sum(len(b.ids) for b in batches) // STEP_SAMPLES)
    tokens = min(text, steps * STEP_TOKENS)
    return _PASSES_AT_THE_HEAD * tokens * seconds_per_token_at_the_head(loaded)


def bytes_per_token(loaded: LoadedModel, recipe: QuantRecipe) -> int:
    """What waits on the host for every token: the streams, and a group's inputs and targets."""
    hidden = int(loaded.text_config.hidden_size)
    widest = 0
    groups = (
        (index, group)
        for index in sorted({0, loaded.num_blocks - 1})
        for group in loaded.groups(loaded.meta_block(index))
    )
    for index, group in groups if recipe.needs_groups else ():
        n = k = hidden
        if group.loss_module in group.linears:
            n, k = loaded.source.shape(loaded.source_name(index, f"{group.loss_module}.weight"))
        if group.expert is not None:  # beside what all experts read; a rare one sees all tokens
            widest = max(widest, hidden + n + k)
            continue
        widest = max(widest, n + k * (2 if recipe.weighting.needs_quantized_input else 1))
    method = recipe.rounding_method
    if loaded.has_experts and method.statistics:
        widest = max(widest, hidden * (2 if method.shifted else 1))
    streams = 3 if recipe.tuning_passes else 2
    each = getattr(loaded.text_config, "hidden_size_per_layer_input", None) or 0
    each *= 2 if has_in_8_bits(loaded, PER_BLOCK) else 1
    tower = getattr(loaded.config, "vision_config", None)
    added = len(getattr(tower, "deepstack_visual_indexes", None) or ())  # to blocks' outputs
    return 4 * ((streams + added) * hidden + widest + each * loaded.num_blocks)  # fp32


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
