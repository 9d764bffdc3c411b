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


def _round(n: int, k: int, scheme: str, live: _Live) -> float:
    """The most that is held while a weight [n, k] is rounded, in moments of its wider side."""
    torch.manual_seed(0)
    weight, accumulator = torch.randn(n, k), StatsAccumulator(k, shifted=True)
    outputs = []
    for half in (0, 1):
        x, g = (torch.randn(256, size) @ torch.randn(size, size) for size in (k, n))
        accumulator.accumulate(x, x + 0.1 * torch.randn_like(x), half=half)
        outputs.append(g.T @ g)
    del x, g
    stats = accumulator.finish()
    live.peak = live.now
    method, first, second = ROUNDINGS["qronos-outputs"], *outputs
    del outputs
    round_linear(
        weight,
        stats,
        get_scheme(scheme),
        torch.float32,
        method,
        outputs=(first, second),
    )
    return live.peak / (4 * max(n, k) ** 2)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_copies_of_the_second_moments(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_ROWS", K // 9)  # as few as of a width of 18,944
    with _Live() as live:
        assert COPIES - 1 < _round(N, K, scheme, live) < COPIES
    with _Live() as live:  # where another linear of so many outputs waits, with two copies
        assert _round(K, N, scheme, live) < COPIES - 2
