"""torch.empty as the kernels call it, full of what shows where nothing was written.

Only what qig_serve.kernels allocates: torch.compile, its workers and CUDA graphs make tensors of
their own, of types and on devices that cannot be filled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

KERNELS = "qig_serve.kernels"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Filled with NaN, or the type's largest integer."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, in both tests of the kernels and of the quantizers: once is enough."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        if not hasattr(make, "poisons"):
            monkeypatch.setattr(torch, name, _poisoning(make))


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*arguments: object, **options: object) -> torch.Tensor:
        tensor = make(*arguments, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.startswith(KERNELS) else tensor

    made.poisons = True  # type: ignore[attr-defined]
    return made
