"""What the search of one group works on: its loss module's inputs and targets, cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qig_serve.experts import Experts
from qig_serve.family_row import SmoothingGroup
from qig_serve.offline.passes.capture import ModuleCall, Store, catch_call, check_finite, run_module
from qig_serve.offline.passes.routing import RoutedTokens, expert_of
from qig_serve.offline.passes.streams import Streams


@dataclass
class ModuleParts:
    """Inputs and targets of a group's loss module, in parts that pass it one at a time.

    A module that mixes tokens (attention) has the calibration batches as parts. For one that does
    not (MLP, linear, experts with their tokens' routing) the real tokens of all batches are laid
    end to end and cut into equal parts [1, tokens, C]: batches of every length then cost the same,
    and template tokens nothing.
    """

    tokenwise: bool
    calls: list[ModuleCall]
    """The block's call of the module for each part, without the input."""
    inputs: Store
    """X: the input in full precision, [B, T, C]."""
    quantized_inputs: Store | None
    """What the quantized prefix gives in its place; None if nothing needs it."""
    targets: Store
    """f(X, W), [B, T, N]."""
    masks: list[torch.Tensor]
    """Real tokens of the parts, bool [B, T]."""
    act_mean: torch.Tensor
    """mean |X_c| over the real tokens of all processes, [C]."""
    act_max: torch.Tensor
    """max |X_c| over the same tokens, [C]."""

    def clear(self) -> None:
        """Forget all activations."""
        for store in (self.inputs, self.quantized_inputs, self.targets):
            if store is not None:
                store.clear()

    def to_parts(
        self, values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Values of batches [B, T] as values of parts; `masks` are the batches'."""
        if not self.tokenwise:
            return list(values)
        flat = torch.cat([v[m] for v, m in zip(values, masks, strict=True)])
        return [part[None] for part in flat.split([m.numel() for m in self.masks])]

    def to_batches(
        self, values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Inverse of `to_parts`; tokens that are not real become zero."""
        if not self.tokenwise:
            return list(values)
        flat = torch.cat([v[0] for v in values]).split([int(m.sum()) for m in masks])
        batches = []
        for part, mask in zip(flat, masks, strict=True):
            batches.append(torch.zeros(mask.shape, dtype=part.dtype, device=part.device))
            batches[-1][mask] = part
        return batches


def inner_names(group: SmoothingGroup, names: Sequence[str] | None = None) -> list[str]:
    """Linears as names inside the group's loss module ("" for itself); None: the group's own."""
    names = group.linears if names is None else names
    return [n.removeprefix(group.loss_module).removeprefix(".") for n in names]


@torch.no_grad()
def capture_parts(
    block: nn.Module, group: SmoothingGroup, streams: Streams, quantized: bool, where: str
) -> ModuleParts:
    """Runs the block up to the group's loss module on what the search needs.

    quantized: whether that includes what the quantized prefix gives in place of the input.
    """
    module = block.get_submodule(group.loss_module)
    found = [("x", streams.fp), *([("xq", streams.quantized)] if quantized else [])]
    stores = {name: streams.new_store(f"{group.name}-{name}") for name, _ in found}
    masks = [streams.mask(b) for b in range(len(streams))]
    calls: list[ModuleCall] = []
    are_experts = isinstance(module, Experts)
    routing: list[tuple[torch.Tensor, ...]] = []  # that of full precision, whatever the input
    for name, stream in found:
        parts = _Cutter(stores[name], streams.batch_tokens)
        for b, mask in enumerate(masks):
            hidden = stream.get(b, streams.device)
            call = catch_call(block, module, hidden, streams.kwargs(b, stream))
            check_finite(call.hidden, f"{where}, input")
            if stream is streams.fp:
                calls.append(call.without_input())
            if are_experts and stream is streams.fp:
                routing.append(tuple(given[mask.flatten()] for given in call.args[1:]))
            if call.only_hidden or are_experts:
                parts.add(call.hidden[mask])
            else:
                stores[name].put(b, call.hidden)
        parts.flush()
    tokenwise = calls[0].only_hidden or are_experts
    if tokenwise:
        calls = [calls[0]] * parts.count
        if are_experts:
            cut = [torch.cat(given).split(parts.sizes) for given in zip(*routing, strict=True)]
            calls = [ModuleCall((None, *given), {}) for given in zip(*cut, strict=True)]
        masks = [torch.ones(1, n, dtype=torch.bool, device=streams.device) for n in parts.sizes]

    captured = (tokenwise, calls, stores["x"], stores.get("xq"))
    return _with_targets(module, captured, masks, group, streams, where)


@torch.no_grad()
def capture_expert(
    block: nn.Module, group: SmoothingGroup, routed: RoutedTokens, streams: Streams, where: str
) -> ModuleParts:
    """The same of the last linear of an expert, on the tokens that it sees."""
    assert group.expert is not None
    module, expert = block.get_submodule(group.loss_module), expert_of(block, group.expert)
    store = streams.new_store(f"{group.name}-x")
    parts = _Cutter(store, streams.batch_tokens)
    for b in range(len(streams)):
        parts.add(expert.inner(routed.tokens(b, group.expert, streams.device)))
    parts.flush()
    real = bool(parts.sizes)
    if not real:  # of several processes, one may have none
        parts.add(torch.zeros(1, expert.down_proj.in_features, device=streams.device))
        parts.flush()
    calls = [ModuleCall((None,), {})] * parts.count
    masks = [torch.full((1, n), real, device=streams.device) for n in parts.sizes]
    return _with_targets(module, (True, calls, store, None), masks, group, streams, where)


def _with_targets(
    module: nn.Module,
    captured: tuple[bool, list[ModuleCall], Store, Store | None],
    masks: list[torch.Tensor],
    group: SmoothingGroup,
    streams: Streams,
    where: str,
) -> ModuleParts:
    """The parts, with what the module makes of them; `captured` are ModuleParts' first fields."""
    _, calls, inputs, _ = captured
    targets = streams.new_store(f"{group.name}-y")
    total, peak, tokens = torch.zeros(()), torch.zeros(()), 0
    for i, (call, mask) in enumerate(zip(calls, masks, strict=True)):
        x = inputs.get(i, streams.device)
        target = run_module(module, call.with_input(x))
        check_finite(target, f"{where}, output")
        targets.put(i, target)
        real = x[mask].float().abs()  # [tokens, C]
        total, tokens = total.to(x.device) + real.sum(0), tokens + len(real)
        if len(real):
            peak = torch.maximum(peak.to(x.device), real.amax(0))
    streams.ranks.sum(total)
    streams.ranks.maximum(peak)
    act_mean = total / max(streams.ranks.total(tokens)[0], 1)
    return ModuleParts(*captured, targets, masks, act_mean, peak)


class _Cutter:
    """Cuts a stream of tokens [n, C] into parts [1, tokens, C] and puts them into a store."""

    def __init__(self, store: Store, tokens: int) -> None:
        self._store, self._tokens = store, tokens
        self._waiting: list[torch.Tensor] = []
        self.sizes: list[int] = []

    @property
    def count(self) -> int:
        """Parts so far."""
        return len(self.sizes)

    def add(self, tokens: torch.Tensor) -> None:
        """Takes n more tokens."""
        self._waiting.append(tokens)
        while sum(map(len, self._waiting)) >= self._tokens:
            joined = torch.cat(self._waiting)
            self._put(joined[: self._tokens])
            self._waiting = [joined[self._tokens :]]

    def flush(self) -> None:
        """Puts what is left."""
        if sum(map(len, self._waiting)):
            self._put(torch.cat(self._waiting))
        self._waiting = []

    def _put(self, tokens: torch.Tensor) -> None:
        self._store.put(self.count, tokens[None].clone())
        self.sizes.append(len(tokens))
