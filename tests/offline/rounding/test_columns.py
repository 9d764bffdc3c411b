"""What rounds columns on a GPU: a kernel that has shown that it does, or torch and a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qig_serve.offline.rounding import columns

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    columns._chosen.cache_clear()
    yield
    columns._chosen.cache_clear()


def test_a_cpu_rounds_in_torch() -> None:
    assert columns.column_rounding(torch.device("cpu")) is columns.in_torch
    assert not columns.slow_rounding(torch.device("cpu"))


def test_a_kernel_that_agrees_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "share_of_rows_that_differ", lambda *_: 0.01)
    assert columns.column_rounding(GPU).__name__ == "round_columns"
    assert not columns.slow_rounding(GPU)


def test_a_kernel_that_does_not_agree_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "share_of_rows_that_differ", lambda *_: 0.5)
    assert columns.column_rounding(GPU) is columns.in_torch
    assert columns.slow_rounding(GPU) == (
        "columns are rounded in torch on cuda, which takes longer: "
        "kernels/round_columns.py got 50% of rows wrong"
    )


def test_a_kernel_that_cannot_be_compiled_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any) -> float:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(columns, "share_of_rows_that_differ", compiled)
    assert columns.column_rounding(GPU) is columns.in_torch
    assert columns.slow_rounding(GPU).endswith("cannot be used: Failed to find C compiler.")


def test_rows_that_differ_are_counted() -> None:
    def short(*block: Any) -> tuple[torch.Tensor, torch.Tensor]:
        codes, errors = columns.in_torch(*block)
        codes[-1, ::4] += 1
        return codes, errors

    cpu = torch.device("cpu")
    assert columns.share_of_rows_that_differ(columns.in_torch, cpu) == 0
    assert columns.share_of_rows_that_differ(short, cpu) == 0.25
