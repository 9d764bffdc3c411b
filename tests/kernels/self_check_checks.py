"""The check before serving, on right kernels and on wrong ones: collected like kernel_checks.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expert_checks import HIDDEN, INTER, stack
from kernel_checks import DEVICE, DTYPES, INTERPRETED, make

from qig_serve.formats import SCHEMES
from qig_serve.kernels import experts, ops, self_check
from qig_serve.kernels.library import ExpertsJob, LinearJob
from qig_serve.kernels.self_check import Rows

MOST = 33 if INTERPRETED else 1 << 20
NAMES = ["w3a16", "w4a8", "w8a16"]


@pytest.fixture
def as_vllm_loads() -> Iterator[None]:
    """Under a default dtype of 16 bits."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def job_of(name: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> LinearJob:
    return LinearJob(SCHEMES[name], n, k, dtype, DEVICE)


@pytest.mark.usefixtures("as_vllm_loads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_right_kernels_have_no_fault(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every tile that the layer may run with: a few thousandths, however many tokens."""
    monkeypatch.setattr(self_check, "TOLERANCE", 0.004)
    n, k = 300, 416
    case, job = make(name, 1, n, k, dtype), job_of(name, n, k, dtype)
    counts = [m for m in ops.token_counts(job) if m <= MOST]
    assert len(counts) > 1

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(job.scheme, x, case.prepared, n, k)

    assert self_check.fault_of_linear(job, Rows(case.stored), counts, multiply) == ""
    if name == "w8a16":
        rows = Rows(case.stored)
        assert self_check.fault_of_lookup(
            job, rows, lambda ids: ops.embedding(job.scheme, ids, case.prepared, n, k, dtype)
        ) == ""  # fmt: skip


@pytest.mark.usefixtures("as_vllm_loads")
@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_code_in_128_is_a_fault(name: str) -> None:
    n, k = 130, 256
    case, job = make(name, 1, n, k, torch.bfloat16), job_of(name, n, k)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 5::128] = 0
        return ops.linear(job.scheme, x, case.prepared, n, k)

    fault = self_check.fault_of_linear(job, Rows(case.stored), [1, 3], multiply)
    assert fault.startswith(f"the kernels of {name} are ") and "for 1 tokens" in fault


def test_numbers_beyond_fp16_are_no_fault() -> None:
    wanted = torch.tensor([[1e6, -2e5, 3.0]])
    assert self_check._error(wanted.half(), wanted) < 1e-3
    for other in (-torch.inf, torch.nan):
        got = torch.tensor([[other, -torch.inf, 3.0]], dtype=torch.float16)
        assert not self_check._error(got, wanted) <= self_check.TOLERANCE


@pytest.mark.parametrize(("of", "top_k"), [(128, 8), (256, 8), (512, 10), (8, 2)])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_every_tile_of_experts_is_tried(scheme: str, of: int, top_k: int) -> None:
    job = ExpertsJob(scheme, HIDDEN, INTER, of, top_k, "silu", torch.bfloat16, DEVICE)
    tried = {experts.select(scheme, m * top_k, of) for m in experts.token_counts(job)}
    assert tried == {tile for _, tile in experts.TILES[scheme]}


@pytest.mark.usefixtures("as_vllm_loads")
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_experts_are_checked(scheme: str) -> None:
    gate_up = stack(scheme, 5, 2 * INTER, HIDDEN, torch.bfloat16)
    down = stack(scheme, 5, HIDDEN, INTER, torch.bfloat16)
    job = ExpertsJob(scheme, HIDDEN, INTER, 5, 2, "silu", torch.bfloat16, DEVICE)
    counts = [m for m in experts.token_counts(job) if m <= MOST]
    assert len(counts) > 1
    stored = gate_up.stored[:2], down.stored[:2]

    def run(x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        given = gate_up.prepared, down.prepared, INTER, "silu"
        return experts.apply(scheme, x, routing, ids, *given)

    assert self_check.fault_of_experts(job, stored, counts, run) == ""
    swapped = stored[0], stored[1][::-1]
    fault = self_check.fault_of_experts(job, swapped, counts, run)
    assert f"the kernels of {scheme} experts are" in fault
