"""All smoothing groups of one block, in the order in which it runs them; experts come last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from qig_serve.family_row import SmoothingGroup, expert_number
from qig_serve.offline.equalization.experts import equalize_experts
from qig_serve.offline.equalization.group import equalize_group
from qig_serve.offline.importance.gradients import AnswerGradients
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.recipe import Equalization
from qig_serve.offline.results import GroupResult


def equalize_block(
    block: nn.Module,
    groups: Sequence[SmoothingGroup],
    streams: Streams,
    settings: Equalization,
    gradients: AnswerGradients | None,
    index: int,
    results: list[GroupResult],
) -> Iterator[tuple[float, str]]:
    """Equalizes the groups in place; `results` gets what each leaves behind.

    Yields, before each step, the fraction that is done and what comes.
    """
    common = [group for group in groups if group.expert is None]
    experts = groups[len(common) :]
    steps = len(common) + bool(experts)
    token_weights = []
    for i, group in enumerate(common):
        yield i / steps, group.name
        results.append(equalize_group(block, group, streams, settings, gradients, index))
        if any(expert_number(name) is not None for name in group.linears):
            token_weights = results[-1].token_weights
    if experts:
        yield len(common) / steps, experts[0].name
        results += equalize_experts(block, experts, streams, settings, token_weights, index)
