"""A layer of experts on the CPU against the oracle on the checkpoint's own tensors."""

from __future__ import annotations

import pytest
import torch
from test_cpu import make

from qig_serve.formats import SCHEMES
from qig_serve.kernels import cpu, cpu_experts, reference

EXPERTS, HIDDEN, INTER = 5, 160, 96
ROUTINGS = {
    "uneven": [[0, 1], [1, 3], [1, 0], [3, 1]],
    "all on one": [[2]] * 7,
    "some elsewhere": [[0, -1], [-1, -1], [-1, 4], [4, 0]],
    "all elsewhere": [[-1]] * 2,
}


def stack(scheme: str, n: int, k: int, dtype: torch.dtype) -> tuple[list, dict[str, torch.Tensor]]:
    """Of every expert: what is stored; and the prepared tensors, stacked."""
    stored = [make(scheme, n, k, seed)[0] for seed in range(EXPERTS)]
    prepared = [cpu.prepare(SCHEMES[scheme], tensors, dtype) for tensors in stored]
    return stored, {name: torch.stack([p[name] for p in prepared]) for name in prepared[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_layer(activation: str, scheme: str, name: str, dtype: torch.dtype) -> None:
    ids = torch.tensor(ROUTINGS[name], dtype=torch.int32)
    gate_up, of_gate_up = stack(scheme, 2 * INTER, HIDDEN, dtype)
    down, of_down = stack(scheme, HIDDEN, INTER, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), HIDDEN, generator=generator).to(dtype)
    routing = torch.rand(ids.shape, generator=generator)

    got = cpu_experts.apply(scheme, x, routing, ids, of_gate_up, of_down, INTER, activation)
    wanted = reference.experts(x, routing, ids, gate_up, down, scheme, activation)
    near = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert got.dtype == dtype and float((got - wanted).norm()) <= near * float(wanted.norm())


def test_a_compiler_sees_one_op() -> None:
    ids = torch.tensor(ROUTINGS["uneven"], dtype=torch.int32)
    _, gate_up = stack("w3a16", 2 * INTER, HIDDEN, torch.float32)
    _, down = stack("w3a16", HIDDEN, INTER, torch.float32)
    x, routing = torch.ones(len(ids), HIDDEN), torch.ones(ids.shape)

    def run(x: torch.Tensor) -> torch.Tensor:
        return cpu_experts.apply("w3a16", x, routing, ids, gate_up, down, INTER, "silu")

    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
