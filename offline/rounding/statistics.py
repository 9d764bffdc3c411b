"""Second moments of what the linears of one block read, gathered when they are about to be rounded.

Linears with one input share them. What is routed to experts is caught once for all of them, and
each expert's rows are taken from there (passes/routing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qig_serve.family_row import SmoothingGroup, expert_number
from qig_serve.offline.passes.capture import catch_call, check_finite, quantized_activations
from qig_serve.offline.passes.hessian import LinearStats, StatsAccumulator
from qig_serve.offline.passes.routing import RoutedTokens, capture_routed, expert_of
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Rounding
from qig_serve.offline.results import ExpertsReport, GroupResult


def sharing_input(group: SmoothingGroup) -> list[list[str]]:
    """A group's linears by the input they read: those of one module read the same."""
    found: dict[str, list[str]] = {}
    for name in group.linears:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(found.values())


@dataclass
class BlockStatistics:
    """Of a block that is being rounded, and of the block before equalization."""

    block: nn.Module
    original: nn.Module
    linears: Sequence[nn.Module]
    """All of the block that are rounded."""
    streams: Streams
    method: Rounding
    where: str
    _routed: RoutedTokens | None = field(default=None, init=False)
    _routed_fp: RoutedTokens | None = field(default=None, init=False)

    @property
    def experts(self) -> ExpertsReport | None:
        """How many tokens each expert saw, once one was looked at."""
        return None if self._routed is None else self._routed.report

    def clear(self) -> None:
        """Forget all activations."""
        for routed in (self._routed, self._routed_fp):
            if routed is not None:
                routed.clear()

    def of(self, name: str, result: GroupResult | None) -> LinearStats:
        """Of the input of linear `name`, over the tokens of all batches.

        result: of its group's equalization; without, all tokens count alike.
        """
        linear = self.block.get_submodule(name)
        accumulator = StatsAccumulator(linear.in_features, self.method.shifted, self.streams.device)
        expert = expert_number(name)
        if expert is not None:
            self._caught()  # of all processes together
        for b in range(len(self.streams)):
            batch = self.streams.batches[b]
            found = torch.ones(batch.token_mask.numel(), device=self.streams.device)
            if result is not None and self.method.weighted:
                found = result.token_weights[b].flatten()
            half = batch.half.repeat_interleave(batch.token_mask.shape[1]).to(found.device)
            if expert is None:
                x_q, x_fp = self._inputs(b, name)
            else:
                x_q, x_fp, rows = self._expert_inputs(b, name, expert)
                assert self._routed is not None
                found = self._routed.token_weights(b, expert, found, 2)
                half = half[rows.to(half.device)]
            check_finite(x_q, f"{self.where}, {name}, input")
            if x_fp is None:
                accumulator.accumulate(x_q, None, found)
                continue
            if result is not None and result.columns is not None:
                x_fp = x_fp / result.columns
            for second, part in enumerate((~half, half)):
                accumulator.accumulate(x_q[part], x_fp[part], found[part], second)
        return accumulator.finish(self.streams.ranks)

    def _inputs(self, b: int, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [n, K] as the quantized prefix gives them; in full precision if needed."""
        streams = self.streams
        with quantized_activations(self.linears, streams.quantizes_activations):
            hidden = streams.quantized.get(b, streams.device)
            kwargs = streams.kwargs(b, streams.quantized)
            x_q = catch_call(self.block, self.block.get_submodule(name), hidden, kwargs).hidden
        if not self.method.shifted:
            return x_q.flatten(0, -2), None
        hidden, kwargs = streams.fp.get(b, streams.device), streams.kwargs(b)
        x_fp = catch_call(self.original, self.original.get_submodule(name), hidden, kwargs).hidden
        return x_q.flatten(0, -2), x_fp.flatten(0, -2)

    def _expert_inputs(
        self, b: int, name: str, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same of the tokens that an expert sees in the quantized model, and their rows."""
        routed, full = self._caught()
        rows, _ = routed.seen(b, expert)
        device = self.streams.device
        into, x_fp = expert_of(self.block, expert), None
        x_q = routed.inputs.rows(b, rows, device)
        if full is not None:
            x_fp = full.inputs.rows(b, rows, device)
        if name.endswith(".down_proj"):
            with quantized_activations(
                [into.gate_proj, into.up_proj], self.streams.quantizes_activations
            ):
                x_q = into.inner(x_q)
            x_fp = None if x_fp is None else expert_of(self.original, expert).inner(x_fp)
        return x_q, x_fp, rows

    def _caught(self) -> tuple[RoutedTokens, RoutedTokens | None]:
        """What the experts read; what stands before them does not change any more."""
        streams = self.streams
        if self._routed is None:
            self._routed = capture_routed(
                self.block, streams, streams.quantized, "experts-q", self.where, self.linears
            )
            if self.method.shifted:
                self._routed_fp = capture_routed(
                    self.original, streams, streams.fp, "experts-fp", self.where
                )
        return self._routed, self._routed_fp
