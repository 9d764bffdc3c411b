"""The vocabulary's tables, 8-bit weights, one scale per row: collected like kernel_checks.py."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ORDERS,
    TOLERANCE,
    assert_close,
    make,
    poisoned,  # noqa: F401 - a fixture
    run,
)

from qig_serve import packing
from qig_serve.formats import VOCABULARY_SCHEME
from qig_serve.kernels import launch, ops, w8a16
from qig_serve.kernels.tiles import Tile

TILES = {
    "narrow": Tile("halves", 8, 128, num_stages=2, programs_per_sm=3),
    "wide": Tile("halves", 16, 128, num_stages=2, programs_per_sm=3),
    "eight-warps": Tile("halves", 32, 128, 8, num_stages=2),
    "many": Tile("halves", 64, 128, 8, num_stages=3, programs_per_sm=1),
    "dequantize": Tile("dequantize", block_n=0),
    "dequantize-sliced": Tile("dequantize", block_n=128),
}
# (M, N, K): odd N, K of one group, of an odd number of them, of several, of a shorter last one;
# several tiles of tokens
SHAPES = [(1, 77, 1024), (7, 129, 384), (16, 257, 128), (40, 130, 384), (3, 130, 576)]


def weight_of(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    return packing.unpack_linear(stored, VOCABULARY_SCHEME)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_the_head(tile: Tile, m: int, n: int, k: int) -> None:
    kinds = [(dtype, has_bias) for dtype in DTYPES for has_bias in (False, True)]
    if INTERPRETED:  # each with other shapes
        kinds = [(DTYPES[m % 2], n % 2 == 1)]
    for dtype, has_bias in kinds:
        case = make("w8a16", m, n, k, dtype)
        bias = case.bias if has_bias else None
        expected = case.x.float() @ weight_of(case.stored).t()
        got = run("w8a16", case, n, bias, tile, not INTERPRETED)
        assert got.dtype == dtype
        assert_close(got, expected if bias is None else expected + bias.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("m", [0, 1, 9, 33, 129])
def test_the_op_takes_any_number_of_tokens(m: int) -> None:
    case = make("w8a16", m, 300, 256, torch.bfloat16)
    got = ops.linear(VOCABULARY_SCHEME, case.x, case.prepared, 300, 256)
    assert got.shape == (m, 300)
    if m:
        expected = case.x.float() @ weight_of(case.stored).t()
        assert_close(got, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orders", ORDERS, ids=str)
@pytest.mark.parametrize("k", [384, 160])
def test_rows_are_the_dequantized_ones(
    k: int, orders: launch.Orders, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "orders", lambda _: orders)
    w8a16.table_order.cache_clear()
    n = 300
    case = make("w8a16", 1, n, k, dtype)
    ids = torch.tensor([[0, 299, 5], [5, 128, 127]], device=DEVICE)
    got = ops.embedding(VOCABULARY_SCHEME, ids, case.prepared, n, k, dtype)
    w8a16.table_order.cache_clear()
    assert torch.equal(got, weight_of(case.stored)[ids].to(dtype))
    none = ops.embedding(VOCABULARY_SCHEME, ids[:0], case.prepared, n, k, dtype)
    assert none.shape == (0, 3, k)


def test_a_tile_in_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "orders", lambda _: launch.Orders(16, 16, 8))
    case = make("w8a16", 1, 128, 128, torch.bfloat16)
    with pytest.raises(ValueError, match="too narrow"):
        run("w8a16", case, 128, None, Tile("halves", 4, 64, 2, num_stages=2), not INTERPRETED)
    w8a16.table_order.cache_clear()
