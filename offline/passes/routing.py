"""Which calibration tokens each expert of a block sees.

Caught once per block: an expert's inputs are rows of what all experts read, so that statistics of
128 experts cost one pass of what stands before them. An expert e adds p_te f_e(x_t) to the output
of token t, p its routing weight. An error of f_e so enters the block's output times p, its square
times p^2: in a sum of squared errors (a Hessian) a token counts lambda_t p_te^2, in one of
absolute errors lambda_t p_te.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qig_serve.experts import Expert, experts_of
from qig_serve.offline.passes.capture import Store, catch_call, check_finite, quantized_activations
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.results import ExpertsReport

_LEAST_WEIGHT = 1e-6  # of the mean
RARE = 1 / 4
"""Of the tokens that an expert has inputs, as a fraction of its inputs: with fewer, its second
moments are mostly zero, and say less of what it will see than those of the layer's other tokens."""


@dataclass
class RoutedTokens:
    """The experts' inputs in one stream, and which of them go to which expert."""

    inputs: Store
    """Real tokens of each batch, [n, H], before they are shared out."""
    experts: list[torch.Tensor]
    """The experts of each token, int64 [n, k], on the host."""
    weights: list[torch.Tensor]
    """Their routing weights, fp32 [n, k], on the host."""
    report: ExpertsReport

    def seen(self, b: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of batch b that calibrate an expert, int64 [m], and its routing weight p of each.

        A rare expert has all rows, and weight 1.
        """
        if expert in self.report.rare:
            rows = torch.arange(len(self.experts[b]))
            return rows, torch.ones(len(rows))
        hit = self.experts[b] == expert
        rows = hit.any(-1).nonzero()[:, 0]
        return rows, (self.weights[b] * hit).sum(-1)[rows]

    def token_weights(self, b: int, expert: int, weights: torch.Tensor, power: int) -> torch.Tensor:
        """lambda p^power [m] of the rows `seen`; `weights` are lambda [n] of all tokens.

        Where all that an expert sees weighs nothing (an image's tokens can), they count alike.
        """
        rows, routing = self.seen(b, expert)
        weights = weights.clamp(min=_LEAST_WEIGHT * float(weights.mean()))
        return weights[rows.to(weights.device)] * routing.to(weights).pow(power)

    def tokens(self, b: int, expert: int, device: torch.device) -> torch.Tensor:
        """What an expert reads of batch b, [m, H]."""
        return self.inputs.rows(b, self.seen(b, expert)[0], device)

    def clear(self) -> None:
        """Forget all activations."""
        self.inputs.clear()


@torch.no_grad()
def capture_routed(
    block: nn.Module,
    streams: Streams,
    stream: Store,
    name: str,
    where: str,
    linears: Sequence[nn.Module] = (),
) -> RoutedTokens:
    """From one stream; `linears` are those that see int8 inputs under w4a8, `name` the store's."""
    module = experts_of(block)
    inputs, chosen, weights = streams.new_store(name), [], []
    counts = torch.zeros(len(module), dtype=torch.float64)
    for b in range(len(streams)):
        with quantized_activations(linears, streams.quantizes_activations and bool(linears)):
            hidden = stream.get(b, streams.device)
            call = catch_call(block, module, hidden, streams.kwargs(b, stream))
        found, index, routing = call.args
        check_finite(found, f"{where}, input of the experts")
        inputs.put(b, found.flatten(0, -2))
        chosen.append(index.cpu())
        weights.append(routing.float().cpu())
        counts += torch.bincount(chosen[-1].flatten(), minlength=len(module))
    streams.ranks.sum(counts)
    least = int(RARE * expert_of(block, 0).gate_proj.in_features * streams.share)
    tokens = [int(count) for count in counts]
    rare = [e for e, count in enumerate(tokens) if count < least]
    return RoutedTokens(
        inputs, chosen, weights, ExpertsReport(tokens=tokens, rare=rare, least=least)
    )


def expert_of(block: nn.Module, expert: int) -> Expert:
    """An expert of a block."""
    module = experts_of(block)[expert]
    assert isinstance(module, Expert)
    return module
