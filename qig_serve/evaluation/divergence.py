"""How far a quantized model's answers drift from full precision: KL on answer tokens.

Both models read the reference answer (teacher forcing), in fp32, through transformers. At every
answer token, KL(full precision || quantized) = sum_v p(v) (log p(v) - log q(v)), in nats.
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


@torch.inference_mode()
def _log_probabilities(
    model: Any, processor: Any, batch: _Batch, samples: Sequence[Sample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [tokens, vocabulary] (fp32, CPU) and the answer tokens [tokens]."""
    chosen = [samples[i] for i in batch.indices]
    inputs = model_inputs(processor, batch.texts, chosen, model)
    logits = model(**inputs, logits_to_keep=max(batch.lengths) + 1, use_cache=False).logits
    ids = inputs["input_ids"]
    rows = [logits[row, -n - 1 : -1] for row, n in enumerate(batch.lengths)]
    targets = torch.cat([ids[row, -n:] for row, n in enumerate(batch.lengths)])
    return torch.cat(rows).float().log_softmax(-1).cpu(), targets.cpu()


@dataclass(frozen=True)
class _Tokens:
    """A figure for each answer token, in the order of the batches."""

    kl: torch.Tensor
    same_top: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor


def _compare(log_p: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor) -> _Tokens:
    kl = []
    for p, q in zip(log_p.split(_KL_ROWS), log_q.split(_KL_ROWS), strict=True):
        # 0 * (-inf - -inf) is 0, not NaN: a token that both rule out adds nothing.
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
        kl.append(terms.sum(-1).clamp(min=0))  # rounding alone can make it negative
    at = targets[:, None]
    return _Tokens(
        torch.cat(kl),
        log_p.argmax(-1) == log_q.argmax(-1),
        log_p.gather(1, at)[:, 0],
        log_q.gather(1, at)[:, 0],
    )


def _perplexity(log_likelihoods: Sequence[torch.Tensor]) -> float:
    return math.exp(-float(torch.cat(list(log_likelihoods)).double().mean()))


def _summarize(
    parts: Sequence[_Tokens], plan: Sequence[_Batch], types: Sequence[str]
) -> Divergence:
    kl = torch.cat([p.kl for p in parts]).double()
    lengths = [n for batch in plan for n in batch.lengths]
    kinds = [types[i] for batch in plan for i in batch.indices]
    sums = [float(piece.sum()) for piece in kl.split(lengths)]
    mean, error = clustered_mean(sums, lengths)
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
    )


def divergences(
    reference: Path,
    models: Sequence[tuple[str, Path]],
    samples: Sequence[Sample],
    progress: Progress,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Divergence]]:
    """(name, figures) of each model against the full-precision `reference`, in turn.

    The reference runs once; its log-probabilities wait on disk, one file per batch, so that memory
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
                _log_probabilities(model, processor, batch, samples), Path(folder, f"{number}.pt")
            )
            done += len(batch.indices)
            progress("full precision: answer tokens", done, total)
        for name, directory in models:
            del model  # one model in memory at a time
            done, parts = 0, []
            progress(f"{name}: KL on answer tokens", 0, total)
            model = load_model(directory, dtype)
            for number, batch in enumerate(plan):
                log_p, targets = torch.load(Path(folder, f"{number}.pt"))
                log_q, _ = _log_probabilities(model, processor, batch, samples)
                parts.append(_compare(log_p, log_q, targets))
                done += len(batch.indices)
                progress(f"{name}: KL on answer tokens", done, total)
            yield name, _summarize(parts, plan, types)
