"""What a quantization run found out: the content of report.json, block by block.

Plain data. report.html and the model card are rendered from it. Beside it what a group's
equalization leaves behind for the rest of its block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from qig_serve import sizes
from qig_serve.family_row import any_expert

if TYPE_CHECKING:
    import torch

REPORT_FILE = "report.json"
_NAMED = 8
"""Blocks whose rare experts a sentence names."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenShare(_Data):
    """How much of the token weight one modality gets, over all samples."""

    tokens: int
    """Real tokens of this modality."""
    before_clip: float
    """Share of the importance before outliers are clipped, 0..1."""
    after_clip: float
    """Share of the token weights that the search used, 0..1."""
    clipped: int = 0
    """Tokens whose importance lay outside the quartile fences and was moved onto them."""


COMPLETENESS_LIMIT = 0.02
"""Weight-only attributions must come this near F(X) - F(X0), relatively."""


class ModuleReport(_Data):
    """One equalization search: a previous op, the linears behind it, the module of the loss."""

    name: str
    linears: list[str]
    loss_module: str
    exponent: float
    """The chosen r (smoothquant: alpha; 0 without equalization)."""
    loss: float
    """Weighted loss with the chosen scales."""
    loss_rtn: float
    """The same loss at the same bits without equalization: round to nearest."""
    losses: list[float] = Field(default_factory=list)
    """Loss of every choice that was tried, round to nearest first."""
    completeness: float | None = None
    """|sum of I - (F(X) - F(X0))| / |F(X) - F(X0)|; None unless weights come from QIG."""
    token_shares: dict[str, TokenShare] = Field(default_factory=dict)
    """By modality: image, text."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time of capture, token_weights, search and channels."""


class LinearReport(_Data):
    """How one linear was rounded, where the method looked at its inputs."""

    tokens: int = 0
    """Tokens in the statistics."""
    error_rtn: float = 0.0
    """Output error of round-to-nearest with min-max ranges, tr((T - Q) H (T - Q)^T), as a fraction
    of the output's energy tr(W H W^T); T is the method's target, mostly W itself."""
    error: float = 0.0
    """The same of the result."""
    clip_ratio: float = 1.0
    """Mean over groups of the chosen scale over that of the min-max range: below 1 the range was
    drawn in."""
    clipped: float = 0.0
    """Share of the weights more than half a step outside the range."""
    shift: float | None = None
    """Fraction of the target shift that validation kept (rounding/qronos.py)."""
    shift_damp: float | None = None
    """Its damping, as a fraction of each input's energy."""
    damping: float | None = None
    """Damping of the compensation, as a fraction of each input's energy (gptq: of the mean's)."""
    damping_raised: int | None = None
    """Factor by which damping had to grow for the Hessian to be positive definite."""
    outputs_damping: float | None = None
    """Damping of what errors of outputs cost (rounding/outputs.py), as a fraction of each one's,"""
    outputs_held_out: float | None = None
    """and what those errors cost on samples left out, over the cost of rows rounded each for
    itself: which they are where this is 1 or more."""


class ExpertsReport(_Data):
    """How much of the calibration data each expert of a block saw."""

    tokens: list[int]
    """Real tokens that are routed to each."""
    least: int
    """Experts with fewer are rare,"""
    rare: list[int]
    """and calibrated on all tokens of the layer: these."""


class BlockReport(_Data):
    """One decoder block."""

    index: int
    modules: list[ModuleReport] = Field(default_factory=list)
    linears: dict[str, LinearReport] = Field(default_factory=dict)
    """By name; empty where the rounding method looks at weights alone."""
    experts: ExpertsReport | None = None
    """None without experts, and where nothing is calibrated on what they see."""
    output_error: float = 0.0
    """Mean squared error of the block's output in the quantized model over the mean square of
    the full-precision output, real tokens only."""
    seconds: float = 0.0
    host_bytes: int = 0
    """Peak resident memory of the process so far."""
    device_bytes: int = 0
    """Peak memory allocated on the GPU so far; 0 on a CPU."""

    def line(self) -> str:
        """For people."""
        text = f"output error {100 * self.output_error:.3g}%"
        at_rtn = sum(m.loss_rtn for m in self.modules)
        return text + (
            f", {sum(m.loss for m in self.modules) / at_rtn:.2f} of RTN's loss" if at_rtn else ""
        )


def experts_together(block: BlockReport) -> list[tuple[str, LinearReport]]:
    """A block's linears by name, those of all experts as one: means, and all tokens."""
    found: dict[str, list[LinearReport]] = {}
    for name, linear in block.linears.items():
        found.setdefault(any_expert(name), []).append(linear)
    return [(name, alike[0] if len(alike) == 1 else _mean(alike)) for name, alike in found.items()]


def _mean(linears: Sequence[LinearReport]) -> LinearReport:
    def mean(values: Iterable[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    fields = {n: mean(getattr(x, n) for x in linears) for n in LinearReport.model_fields}
    tokens, raised = sum(x.tokens for x in linears), [x.damping_raised for x in linears]
    worst = max((r for r in raised if r is not None), default=None)
    return LinearReport.model_validate({**fields, "tokens": tokens, "damping_raised": worst})


class TuningReport(_Data):
    """What tuning the scales of all blocks has done (offline/tuning/scales.py)."""

    kept: bool
    """Whether the tuned scales are those of the checkpoint."""
    steps: int = 0
    kl_before: float = 0.0
    """Mean KL to full precision, nats per token, on calibration samples that were left out."""
    kl_after: float = 0.0
    seconds: float = 0.0

    def line(self) -> str:
        """For people."""
        if not self.steps:
            return "scales are not tuned: too few calibration samples to judge it by"
        text = f"KL on samples left out {self.kl_before:.2e} -> {self.kl_after:.2e}"
        text = f"scales tuned in {self.steps} steps, {self.seconds:.0f} s: {text}"
        return text if self.kept else f"{text}: not kept"


class QuantizationReport(_Data):
    """One run."""

    format_version: int = 1
    model: str
    family: str
    scheme: str
    method: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    """source, samples, sha256, seed, images, tokens by modality, and a hash of every sample."""
    blocks: list[BlockReport] = Field(default_factory=list)
    sweep_seconds: float = 0.0
    """Of the sweep for the answers' gradients, where the rounding asks for them."""
    tuning: TuningReport | None = None
    """None where the recipe asks for no tuning."""
    left_alone: list[str] = Field(default_factory=list)
    """Modules that stay in 16 bits on purpose."""
    eight_bit: list[str] = Field(default_factory=list)
    """Output head and embedding, where they are stored in 8 bits."""
    mlp_channels: int | None = None
    """Where the MLP is stored with channels of zeros behind its own: how many there are in all,"""
    mlp_channels_of_source: int | None = None
    """and how many it was published with."""
    stored_bytes: int = 0
    """Of the checkpoint's weight files, and"""
    source_bytes: int = 0
    """of the source model's tensors; 0 before the checkpoint is complete."""
    warnings: list[str] = Field(default_factory=list)
    fallbacks: list[str] = Field(default_factory=list)
    """Steps that had to take a simpler way; a run with any fails unless allow_fallbacks."""
    estimate: dict[str, float] = Field(default_factory=dict)
    """Estimated by the dry run: seconds, and peaks of host_bytes, disk_bytes, device_bytes."""
    seconds: float = 0.0
    producer: str = ""

    def calibration_line(self, processes: int) -> str:
        """How much there is to calibrate on, for people, and how many processes share it."""
        tokens = self.calibration["tokens"]
        shared = f", shared by {processes} processes" if processes > 1 else ""
        return (
            f"calibration: {self.calibration['samples']} samples with "
            f"{self.calibration['images']} images: {tokens['image']} image, {tokens['text']} text "
            f"and {tokens['special']} template tokens{shared}"
        )

    def size(self) -> str:
        """The checkpoint's and the source model's, for people; empty before it is complete."""
        if not self.stored_bytes:
            return ""
        stored, before = sizes.in_words(self.stored_bytes), sizes.in_words(self.source_bytes)
        return f"{stored} of weights, {before} before"

    def rare_experts(self) -> str:
        """A sentence about experts that saw too little of the calibration data; maybe empty."""
        found = [(b.index, b.experts) for b in self.blocks if b.experts is not None]
        rare = [(index, experts.rare) for index, experts in found if experts.rare]
        if not rare:
            return ""
        count, all_of_them = sum(len(r) for _, r in rare), sum(len(e.tokens) for _, e in found)
        places = "; ".join(f"block {index}: {', '.join(map(str, r))}" for index, r in rare[:_NAMED])
        if len(rare) > _NAMED:
            places += f"; and {len(rare) - _NAMED} more blocks, in {REPORT_FILE}"
        return (
            f"{count} of {all_of_them} experts saw fewer than {found[0][1].least} calibration "
            f"tokens and were calibrated on all tokens of their layer ({places})"
        )

    def summary(self) -> dict[str, float]:
        """A few figures for config.json, which is the same for the same recipe: no times."""
        modules = [m for b in self.blocks for m in b.modules]
        complete = [m.completeness for m in modules if m.completeness is not None]
        before, after = sum(m.loss_rtn for m in modules), sum(m.loss for m in modules)
        figures: dict[str, float] = {"blocks": len(self.blocks)}
        if self.mlp_channels and self.mlp_channels_of_source:
            figures["mlp_channels"] = self.mlp_channels
            figures["mlp_channels_of_source"] = self.mlp_channels_of_source
        if before > 0:
            figures["search_loss_over_rtn"] = after / before
        if complete:
            figures["completeness_worst"] = max(complete)
        if self.blocks:
            figures["output_error_last_block"] = self.blocks[-1].output_error
        return figures


@dataclass
class GroupResult:
    """What one group leaves behind for the rest of its block."""

    report: ModuleReport | None
    """None of experts but the first, whose report is that of all."""
    token_weights: list[torch.Tensor]
    """lambda of each batch, [B, T]."""
    columns: torch.Tensor | None = None
    """What the linears' columns were multiplied by, [K]; None without equalization."""
    changed: list[str] = field(default_factory=list)
    """16-bit parameters of the block that folding changed."""
    fallbacks: list[str] = field(default_factory=list)
    experts: ExpertsReport | None = None
    """Of the first expert."""
