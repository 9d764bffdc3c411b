"""Range search: never worse than min-max by its own measure, better where it should be."""

from __future__ import annotations

import pytest
import torch

from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.offline.rounding.ranges import group_error, search_range
from qig_serve.packing import dequantize, minmax_params, quantize

SCHEME_NAMES = sorted(SCHEMES)


def _heavy_tailed(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) ** 3


def _metric(k: int, scheme: QuantScheme, full: bool) -> torch.Tensor:
    groups = scheme.num_groups(k)
    generator = torch.Generator().manual_seed(1)
    if not full:
        return torch.rand(groups, k // groups, generator=generator) ** 4
    root = torch.randn(groups, k // groups, k // groups, generator=generator)
    return root @ root.transpose(1, 2) / (k // groups)


def _error(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: QuantScheme,
    metric: torch.Tensor,
) -> torch.Tensor:
    error = w - dequantize(quantize(w, scale, zero, scheme), scale, zero)
    return group_error(error.view(len(w), scale.shape[1], -1), metric)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "quadratic"])
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_no_group_is_worse_than_with_its_own_minimum_and_maximum(name: str, full: bool) -> None:
    scheme = SCHEMES[name]
    w, metric = _heavy_tailed(7, 256), _metric(256, scheme, full)
    scale, zero = search_range(w, scheme, torch.bfloat16, metric, grid=16)
    found = _error(w, scale, zero, scheme, metric)
    plain = _error(w, *minmax_params(w, scheme, torch.bfloat16), scheme, metric)
    assert (found <= plain * (1 + 1e-4)).all()
    assert scheme.bits == 8 or found.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_scales_and_zero_points_can_be_stored(name: str) -> None:
    scheme = SCHEMES[name]
    scale, zero = search_range(
        _heavy_tailed(5, 256), scheme, torch.float16, _metric(256, scheme, False), grid=8
    )
    assert torch.equal(scale, scale.half().float()) and (scale > 0).all()
    assert scale.shape == (5, scheme.num_groups(256))
    if scheme.symmetric:
        assert zero is None
    else:
        assert zero is not None and zero.dtype == torch.uint8 and zero.shape == scale.shape
        assert int(zero.max()) <= scheme.qmax


def test_what_matters_is_met() -> None:
    """One input that carries everything is met to a fraction of what min-max leaves."""
    scheme = SCHEMES["w3a16"]
    w = _heavy_tailed(32, 128)
    metric = 1e-6 * torch.eye(128)[None]
    metric[0, 17, 17] = 1
    scale, zero = search_range(w, scheme, torch.float32, metric)
    q = dequantize(quantize(w, scale, zero, scheme), scale, zero)
    plain = dequantize(quantize(w, *minmax_params(w, scheme), scheme), *minmax_params(w, scheme))
    assert (q - w)[:, 17].square().sum() < 0.05 * (plain - w)[:, 17].square().sum()


def test_close_to_an_exhaustive_search() -> None:
    """Against every zero point and 400 scales."""
    scheme = SCHEMES["w2a16"]
    w, metric = _heavy_tailed(16, 128), _metric(128, scheme, False)
    scale, zero = search_range(w, scheme, torch.float32, metric)
    ours = _error(w, scale, zero, scheme, metric).sum()
    full, _ = minmax_params(w, scheme)
    least = torch.full((16, 1), float("inf"))
    for z in range(4):
        zero = torch.full((16, 1), z, dtype=torch.uint8)
        for shrink in torch.linspace(0.05, 1.2, 400).tolist():
            least = torch.minimum(least, _error(w, full * shrink, zero, scheme, metric))
    assert ours < 1.03 * least.sum()


def test_rows_do_not_depend_on_each_other() -> None:
    scheme = SCHEMES["w3a16"]
    w, metric = _heavy_tailed(3000, 128), _metric(128, scheme, False)
    scale, zero = search_range(w, scheme, torch.float32, metric, grid=4)
    last, last_zero = search_range(w[-5:], scheme, torch.float32, metric, grid=4)
    assert zero is not None and last_zero is not None
    assert torch.equal(scale[-5:], last) and torch.equal(zero[-5:], last_zero)


def test_a_group_of_zeros() -> None:
    scheme = SCHEMES["w3a16"]
    w = _heavy_tailed(2, 256)
    w[:, :128] = 0
    scale, zero = search_range(w, scheme, torch.bfloat16, _metric(256, scheme, False), grid=4)
    q = dequantize(quantize(w, scale, zero, scheme), scale, zero)
    assert torch.isfinite(q).all() and (q[:, :128] == 0).all()
