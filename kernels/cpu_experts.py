"""A mixture-of-experts layer on a CPU: the dense path (cpu.py), an expert at a time.

Tokens are sorted by expert, each expert that has any runs once, and its rows are added up in fp32.
How many tokens an expert has is data, so the layer is one op, which a compiler need not look into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from qig_serve.formats import SCHEMES
from qig_serve.kernels import cpu
from qig_serve.kernels.library import ExpertsJob, Prepared, define

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""By vLLM's names."""


def _experts(
    x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor, gate_up: list[torch.Tensor],
    down: list[torch.Tensor], names: str, inter: int, scheme: str, activation: str,
) -> torch.Tensor:  # fmt: skip
    act = ACTIVATIONS[activation]
    k, top_k = x.shape[1], ids.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32)
    found, slots = ids.flatten().sort(stable=True)
    counts = torch.bincount(found[found >= 0], minlength=len(down[0])).tolist()
    first = ids.numel() - sum(counts)  # behind those that are elsewhere
    for expert, count in enumerate(counts):
        if not count:
            continue
        mine = slots[first : first + count]
        first += count
        tokens = mine // top_k
        of_expert = [
            dict(zip(names.split(), (tensor[expert] for tensor in tensors), strict=True))
            for tensors in (gate_up, down)
        ]
        both = cpu.linear(SCHEMES[scheme], x[tokens], of_expert[0], 2 * inter, k)
        gate, up = both.chunk(2, dim=-1)
        part = cpu.linear(SCHEMES[scheme], act(gate) * up, of_expert[1], k, inter)
        out.index_add_(0, tokens, part.float() * routing.flatten()[mine, None])
    return out.to(x.dtype)


define(
    "cpu_experts(Tensor x, Tensor routing, Tensor ids, Tensor[] gate_up, Tensor[] down, "
    "str names, int inter, str scheme, str activation) -> Tensor",
    _experts,
    lambda x, *_: torch.empty_like(x),
)


def apply(
    scheme: str, x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor, gate_up: Prepared,
    down: Prepared, inter: int, activation: str,
) -> torch.Tensor:  # fmt: skip
    """The layer for x [M, K]: [M, K] of x's dtype.

    routing and ids [M, top_k], id -1 for an expert that is elsewhere; gate_up [E, 2 * inter, K] and
    down [E, K, inter]: cpu.prepare's tensors of each expert, stacked; activation: of ACTIVATIONS.
    """
    both = list(gate_up.values()), list(down.values())
    names = " ".join(gate_up)
    return torch.ops.qig.cpu_experts(x, routing, ids, *both, names, inter, scheme, activation)


def token_counts(job: ExpertsJob) -> list[int]:
    """As `cpu.token_counts`."""
    return [1, cpu.KERNELS[job.scheme].MANY_ROWS]


def compile_ahead(job: ExpertsJob) -> None:
    """Nothing is compiled on a CPU."""


def warm_up(job: ExpertsJob) -> None:
    """Nothing to compile; finds out once what this processor offers."""
    cpu.KERNELS[job.scheme].look_up()
