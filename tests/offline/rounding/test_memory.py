"""What is held while a linear of many inputs is rounded: a multiple of its second moments."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qig_serve.formats import get_scheme
from qig_serve.offline.estimate import COPIES
from qig_serve.offline.passes import hessian
from qig_serve.offline.passes.hessian import StatsAccumulator
from qig_serve.offline.recipe import ROUNDINGS
from qig_serve.offline.rounding.linear import round_linear

N, K = 96, 768


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_copies_of_the_second_moments(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_ROWS", K // 9)  # as few as of a width of 18,944
    with _Live() as live:
        torch.manual_seed(0)
        weight, accumulator = torch.randn(N, K), StatsAccumulator(K, shifted=True)
        for half in (0, 1):
            x = torch.randn(256, K) @ torch.randn(K, K)
            accumulator.accumulate(x, x + 0.1 * torch.randn_like(x), half=half)
        del x
        stats = accumulator.finish()
        round_linear(
            weight,
            stats,
            get_scheme(scheme),
            torch.float32,
            ROUNDINGS["qronos-outputs"],
            outputs=(torch.eye(N), torch.eye(N)),
        )
    assert COPIES - 1 < live.peak / (4 * K * K) < COPIES
