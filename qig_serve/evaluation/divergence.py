"""How far a quantized model's answers drift from full precision: KL on answer tokens.

Both models read the reference answer (teacher forcing), in fp32, through transformers. At every
answer token, KL(full precision || quantized) = sum_v p(v) (log p(v) - log q(v)), in nats.

Of a small model a few tokens carry most of the KL, so it tells two methods apart only on many
questions. The error of the states that the output head reads does with fewer: it is about equally
large at every token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qig_serve.evaluation import Progress
from qig_serve.evaluation.models import (
    batches,
    forced_texts,
    load_model,
    model_inputs,
)
from qig_serve.evaluation.statistics import clustered_mean
from qig_serve.model_directory import load_processor
from qig_serve.samples import Sample

_LOGIT_BYTES = 256 << 20  # a batch's fp32 logits on answer tokens stay below this
_MAX_BATCH = 16
_KL_ROWS = 256  # answer tokens whose divergence is computed at once


@dataclass(frozen=True)
class Divergence:
    """Figures over answer tokens; KL in nats."""

    samples: int
    tokens: int
    kl_mean: float
    kl_se: float | None
    """Standard error of the mean, the tokens of one answer taken together; None for one sample."""
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    """Share of answer tokens on which both models' most likely token is the same."""
    perplexity: float
    perplexity_reference: float
    kl_by_type: dict[str, float]
    state_error: float
    """|h' - h|^2 / |h|^2 of what the output head reads, the mean over answer tokens."""
    state_error_se: float | None
    """As `kl_se`."""

    @property
    def perplexity_ratio(self) -> float:
        """Above 1: the reference answers have become less likely."""
        return self.perplexity / self.perplexity_reference


@dataclass(frozen=True)
class _Batch:
    indices: list[int]
    texts: list[str]
    lengths: list[int]
    """Answer tokens of each sample."""


def _plan(processor: Any, samples: Sequence[Sample]) -> list[_Batch]:
    texts, lengths = forced_texts(processor, samples)
    longest = max(lengths) + 1
    size = _LOGIT_BYTES // (longest * len(processor.tokenizer) * 4)
    order = sorted(range(len(samples)), key=lambda i: (lengths[i], len(texts[i])))
    return [
        _Batch(group, [texts[i] for i in group], [lengths[i] for i in group])
        for group in batches(order, samples, max(1, min(_MAX_BATCH, size)))
    ]


@dataclass(frozen=True)
class _Forced:
    """What a model gives at the answer tokens of a batch; on the CPU."""

    log_p: torch.Tensor
    """Log-probabilities [tokens, vocabulary], fp32."""
    states: torch.Tensor
    """What the output head reads [tokens, width], fp32."""
    targets: torch.Tensor
    """The answer tokens [tokens]."""


@torch.inference_mode()
def _forced(model: Any, processor: Any, batch: _Batch, samples: Sequence[Sample]) -> _Forced:
    chosen = [samples[i] for i in batch.indices]
    inputs = model_inputs(processor, batch.texts, chosen, model)
    read: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        kept = max(batch.lengths) + 1
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    finally:
        hook.remove()

    def at_answers(values: torch.Tensor) -> torch.Tensor:
        rows = [values[row, -n - 1 : -1] for row, n in enumerate(batch.lengths)]
        return torch.cat(rows).float()

    ids = inputs["input_ids"]
    targets = torch.cat([ids[row, -n:] for row, n in enumerate(batch.lengths)])
    log_p = at_answers(logits).log_softmax(-1)
    return _Forced(log_p.cpu(), at_answers(read[-1]).cpu(), targets.cpu())


@dataclass(frozen=True)
class _Tokens:
    """A figure for each answer token, in the order of the batches."""

    kl: torch.Tensor
    same_top: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor
    state_error: torch.Tensor


def _compare(full: _Forced, other: _Forced) -> _Tokens:
    log_p, log_q = full.log_p, other.log_p
    kl = []
    for p, q in zip(log_p.split(_KL_ROWS), log_q.split(_KL_ROWS), strict=True):
        # 0 * (-inf - -inf) is 0, not NaN: a token that both rule out adds nothing.
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
        kl.append(terms.sum(-1).clamp(min=0))  # rounding alone can make it negative
    at = full.targets[:, None]
    return _Tokens(
        torch.cat(kl),
        log_p.argmax(-1) == log_q.argmax(-1),
        log_p.gather(1, at)[:, 0],
        log_q.gather(1, at)[:, 0],
        (other.states - full.states).square().sum(-1) / full.states.square().sum(-1),
    )


def _perplexity(log_likelihoods: Sequence[torch.Tensor]) -> float:
    return math.exp(-float(torch.cat(list(log_likelihoods)).double().mean()))


def _summarize(
    parts: Sequence[_Tokens], plan: Sequence[_Batch], types: Sequence[str]
) -> Divergence:
    kl = torch.cat([p.kl for p in parts]).double()
    lengths = [n for batch in plan for n in batch.lengths]
    kinds = [types[i] for batch in plan for i in batch.indices]

    def per_sample(values: torch.Tensor) -> list[float]:
        return [float(piece.sum()) for piece in values.split(lengths)]

    sums = per_sample(kl)
    mean, error = clustered_mean(sums, lengths)
    states = torch.cat([p.state_error for p in parts]).double()
    state_error, state_error_se = clustered_mean(per_sample(states), lengths)
    by_type = {}
    for kind in sorted(set(kinds)):
        inside = [i for i, k in enumerate(kinds) if k == kind]
        by_type[kind] = sum(sums[i] for i in inside) / sum(lengths[i] for i in inside)
    return Divergence(
        samples=len(lengths),
        tokens=len(kl),
        kl_mean=mean,
        kl_se=error,
        kl_median=float(kl.median()),
        kl_p99=float(kl.kthvalue(math.ceil(0.99 * len(kl))).values),
        kl_max=float(kl.max()),
        top1=float(torch.cat([p.same_top for p in parts]).double().mean()),
        perplexity=_perplexity([p.log_q for p in parts]),
        perplexity_reference=_perplexity([p.log_p for p in parts]),
        kl_by_type=by_type,
        state_error=state_error,
        state_error_se=state_error_se,
    )


def divergences(
    reference: Path,
    models: Sequence[tuple[str, Path]],
    samples: Sequence[Sample],
    progress: Progress,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Divergence]]:
    """(name, figures) of each model against the full-precision `reference`, in turn.

    The reference runs once; what it gives waits on disk, one file per batch, so that memory
    holds one model and one batch at a time whatever the vocabulary.
    """
    processor = load_processor(reference)
    plan = _plan(processor, samples)
    types = [s.type for s in samples]
    total = len(samples)
    with tempfile.TemporaryDirectory(prefix="qig-logits-") as folder:
        done = 0
        progress("full precision: answer tokens", 0, total)
        model = load_model(reference, dtype)
        for number, batch in enumerate(plan):
            torch.save(
                vars(_forced(model, processor, batch, samples)), Path(folder, f"{number}.pt")
            )
            done += len(batch.indices)
            progress("full precision: answer tokens", done, total)
        for name, directory in models:
            del model  # one model in memory at a time
            done, parts = 0, []
            progress(f"{name}: KL on answer tokens", 0, total)
            model = load_model(directory, dtype)
            for number, batch in enumerate(plan):
                full = _Forced(**torch.load(Path(folder, f"{number}.pt")))
                parts.append(_compare(full, _forced(model, processor, batch, samples)))
                done += len(batch.indices)
                progress(f"{name}: KL on answer tokens", done, total)
            yield name, _summarize(parts, plan, types)
