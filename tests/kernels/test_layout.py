"""The kernels' layouts: nothing is lost, padding is inert, and where each code lies."""

from __future__ import annotations

import pytest
import torch

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import layout


@pytest.mark.parametrize("order", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 128), (129, 384), (4100, 256), (3, 96), (5, 576)])
def test_w3a16_round_trip(n: int, k: int, dtype: torch.dtype, order: int) -> None:
    codes = torch.randint(0, 8, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, -(-k // 128)).to(dtype)
    zero = torch.randint(0, 8, scale.shape, dtype=torch.uint8)
    packed = packing.pack_linear(codes, scale, zero, SCHEMES["w3a16"], dtype)["weight_packed"]
    kept = layout.repack_w3a16(packed, scale, zero, order)
    pairs, rows = layout.padded_pairs(k), layout.padded_rows(n)
    assert kept["weight_planes"].shape == (pairs, rows // 128, 2, 3, 128, 16)
    assert kept["scale_zero"].shape == (pairs, rows, 2)
    assert not kept["scale_zero"][:, n:].any(), "padded rows must have a zero scale"
    read = layout.unpack_w3a16(kept["weight_planes"], kept["scale_zero"], n, k, order, dtype)
    for got, expected in zip(read, (codes, scale, zero), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", layout.ORDERS)
def test_orders_permute_within_their_span(name: int) -> None:
    order, span = torch.tensor(layout.ORDERS[name]), 32 if name == 8 else name
    assert torch.equal(order.sort().values, torch.arange(128))
    assert torch.equal(order // span, torch.arange(128) // span)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (129, 384), (4100, 256), (3, 96), (5, 576)])
def test_w4a8_round_trip(n: int, k: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1)
    stored = packing.pack_linear(codes, scale, None, SCHEMES["w4a8"], torch.bfloat16)
    kept = layout.repack_w4a8(*stored.values())
    read_codes, read_scale = layout.unpack_w4a8(kept["weight_nibbles"], kept["channel_scale"], n)
    assert torch.equal(read_codes[:, :k], codes) and torch.equal(read_scale, scale)
    assert not read_codes[:, k:].any()
    assert not kept["channel_scale"][n:].any()


@pytest.mark.parametrize(
    ("slice_", "place"),
    [(0, {0: 0x07}), (1, {1: 0x07}), (2, {2: 0x07}), (3, {0: 0xC0, 2: 0x40}),
     (4, {0: 0x38}), (5, {1: 0x38}), (6, {2: 0x38}), (7, {1: 0xC0, 2: 0x80})],
)  # fmt: skip
@pytest.mark.parametrize("order", [16, 32])
def test_w3a16_places(slice_: int, place: dict[int, int], order: int) -> None:
    """The drawing in halves.py's header, code by code; of the pair's second group."""
    for position in (0, 5, 15):
        codes = torch.zeros(128, 256, dtype=torch.uint8)
        codes[77, 128 + layout.ORDERS[order][16 * slice_ + position]] = 7
        planes = layout.repack_w3a16(
            packing.pack(codes, 3), torch.ones(128, 2), torch.zeros(128, 2).byte(), order
        )["weight_planes"]
        expected = torch.zeros(1, 1, 2, 3, 128, 16, dtype=torch.uint8)
        for plane, bits in place.items():
            expected[0, 0, 1, plane, 77, position] = bits
        assert torch.equal(planes.view(torch.uint8), expected)


def test_eight_bit_rows_are_in_the_order_of_the_activations() -> None:
    codes = torch.randint(-127, 128, (130, 384), dtype=torch.int8)
    kept = layout.repack_w8a16(codes, torch.full((130, 1), 0.5), 4)
    assert kept["weight_bytes"].shape == (2, 2, 2, 128, 128)
    row = kept["weight_bytes"][0, 1, 1, 1]  # row 129, second group
    assert torch.equal(row, codes[129, 128:256][list(layout.ORDERS[4])])
    assert not kept["weight_bytes"][1, :, 1].any(), "padding of K must be zeros"
    assert kept["row_scale"][:131].tolist() == [4.0] * 130 + [0.0]
