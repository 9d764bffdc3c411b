"""The kernels' layouts: nothing is lost, padding is inert, and where each code lies."""

from __future__ import annotations

import pytest
import torch

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 128), (129, 384), (4100, 256)])
def test_w3a16_round_trip(n: int, k: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 8, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, k // 128).to(dtype)
    zero = torch.randint(0, 8, scale.shape, dtype=torch.uint8)
    stored = packing.pack_linear(codes, scale, zero, SCHEMES["w3a16"], dtype)
    kept = layout.repack_w3a16(*stored.values(), dtype)
    assert kept["weight_lanes"].shape == (k // 128, layout.padded_rows(n) // 128, 3, 64, 16)
    assert not kept["scale_zero"][:, n:].any(), "padded rows must have a zero scale"
    read = layout.unpack_w3a16(kept["weight_lanes"], kept["scale_zero"], n, dtype)
    for got, expected in zip(read, (codes, scale, zero), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (129, 384), (4100, 256)])
def test_w4a8_round_trip(n: int, k: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1)
    stored = packing.pack_linear(codes, scale, None, SCHEMES["w4a8"], torch.bfloat16)
    kept = layout.repack_w4a8(*stored.values())
    read_codes, read_scale = layout.unpack_w4a8(kept["weight_nibbles"], kept["channel_scale"], n)
    assert torch.equal(read_codes, codes) and torch.equal(read_scale, scale)
    assert not kept["channel_scale"][n:].any()


@pytest.mark.parametrize(
    ("row", "k", "lane", "bits"),
    [
        (0, 0, 0, (0, 1, 2)),  # lo 0
        (0, 4 * 16 + 5, 0, (12, 13, 14)),  # lo 4
        (3, 5 * 16, 1, (0, 1, 2)),  # lo 5
        (64, 0, 1, (9, 10, 11)),  # hi 0
        (127, 6 * 16 + 15, 2, (12, 13, 14)),  # hi 6
    ],
)
def test_w3a16_places(row: int, k: int, lane: int, bits: tuple[int, ...]) -> None:
    """The drawing in w3a16.py's header, code by code."""
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    codes[row, k] = 7
    lanes = layout.repack_w3a16(
        packing.pack(codes, 3), torch.ones(128, 1), torch.zeros(128, 1).byte(), torch.bfloat16
    )["weight_lanes"]
    expected = torch.zeros_like(lanes)
    expected[0, 0, lane, row % 64, k % 16] = sum(1 << bit for bit in bits)
    assert torch.equal(lanes, expected)


def test_w3a16_left_over_code_takes_the_top_bits() -> None:
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    codes[70, 7 * 16 + 2] = 5  # hi 7
    lanes = layout.repack_w3a16(
        packing.pack(codes, 3), torch.ones(128, 1), torch.zeros(128, 1).byte(), torch.bfloat16
    )["weight_lanes"]
    assert lanes[0, 0, :, 6, 2].tolist() == [-(1 << 15), 0, -(1 << 15)]
    assert int((lanes != 0).sum()) == 2
