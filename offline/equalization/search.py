"""The equalization search: one loss, one grid; methods differ only in the token weights.

    min over s of sum_t lambda_t mean over channels | f(X / s, Q_W(W diag(s))) - f(X, W) |_t

f is the module at whose output the loss is measured (attention, MLP, or one linear); for w4a8 the
inputs of all its linears are int8-quantized in the first term. Token weights sum to 1 for each
sample. Uniform weights make it AWQ's search (arXiv 2306.00978), one weight per modality MBQ's
(2412.19509), integrated gradients QIG's (2603.17809).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline.importance.attribution import discrepancy
from qig_serve.offline.passes.capture import (
    ModuleCall,
    all_linears,
    quantized_activations,
    quantized_weights,
    run_module,
)
from qig_serve.offline.processes import ALONE, Ranks


@dataclass(frozen=True)
class SearchBatch:
    """One batch for the search."""

    call: ModuleCall
    """The quantized branch's call of the module, input [B, T, C]."""
    target: torch.Tensor
    """The module's full-precision output [B, T, N]."""
    token_weights: torch.Tensor
    """lambda [B, T]."""


@dataclass(frozen=True)
class Candidate:
    """One choice of scales."""

    exponent: float
    scales: torch.Tensor
    """One an output of the previous op: what is folded."""
    columns: torch.Tensor
    """One an input of the linears, as stored: what the search multiplies by."""


@torch.no_grad()
def evaluate_candidates(
    module: nn.Module,
    linears: Sequence[str],
    candidates: Sequence[Candidate],
    batches: Callable[[], Iterable[SearchBatch]],
    scheme: QuantScheme,
    dtype: torch.dtype,
    where: str,
    ranks: Ranks = ALONE,
    readers: Sequence[str] = (),
) -> list[float]:
    """The loss of each candidate, a weighted mean over the tokens of all processes.

    `linears` and `readers` (which stay in 16 bits) are names inside the module; `batches` are those
    of this process; `where` is for error messages.
    """
    inner = all_linears(module, readers)
    sums: list[float] = []
    for candidate in candidates:
        weights = quantized_weights(module, linears, candidate.columns, scheme, dtype)
        for name in readers:
            weight = module.get_submodule(name).weight
            weights[f"{name}.weight"] = weight * candidate.columns
        total = weight = torch.zeros((), dtype=torch.float64)
        with quantized_activations(inner, scheme.activation_bits is not None):
            for batch in batches():
                call = batch.call.with_input(batch.call.hidden / candidate.columns)
                output = run_module(module, call, weights)
                value = (discrepancy(output, batch.target) * batch.token_weights).sum()
                # Read once per candidate, so that nothing waits for a GPU.
                total = total.to(value.device) + value
                weight = weight.to(value.device) + batch.token_weights.sum()
        sums += [float(total), float(weight)]
    sums = ranks.total(*sums)
    losses = [total / weight for total, weight in zip(sums[::2], sums[1::2], strict=True)]
    if not all(torch.isfinite(torch.tensor(losses))):
        raise UserError(
            f"{where}: the search met NaN or infinity. Check that the model works in full "
            "precision on the calibration samples."
        )
    return losses


def best(losses: Sequence[float]) -> int:
    """Index of the smallest loss; of equal ones, the first (the smallest exponent)."""
    return min(range(len(losses)), key=losses.__getitem__)
