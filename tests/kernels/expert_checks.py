"""The grouped kernels against the oracle, an expert at a time: collected like kernel_checks.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ORDERS,
    PTX,
    TOLERANCE,
    assert_close,
    make,
    poisoned,  # noqa: F401 - a fixture
)

from qig_serve.kernels import expert_blocks, experts, launch, reference
from qig_serve.kernels.tiles import Tile

TILES = {
    "w3a16": {
        "halves-narrow": Tile("halves", 4, 64, 2, 3, programs_per_sm=4),
        "halves": Tile("halves", 8, 128, 4, 3, programs_per_sm=3),
        "halves-wide": Tile("halves", 16, 256, num_stages=2, programs_per_sm=1),
        "many": Tile("prefill", 32, 64, 4, 3),
        "more": Tile("prefill", 64, 128, 4, 3),
    },
    "w4a8": {
        "narrow": Tile("prefill", 8, 64, 2, 4),
        "many": Tile("prefill", 32, 64, 4, 3),
        "more": Tile("prefill", 64, 128, 4, 4),
    },
}
EVERY_TILE = [
    pytest.param(scheme, tile, id=f"{scheme}-{name}")
    for scheme, tiles in TILES.items()
    for name, tile in tiles.items()
]
EXPERTS, HIDDEN, INTER = 5, 96, 32  # shorter than a group


def random_ids(m: int, top_k: int, of: int = EXPERTS, seed: int = 0) -> torch.Tensor:
    """Distinct experts per token, the first ones more often."""
    generator = torch.Generator().manual_seed(seed + m)
    odds = torch.arange(of, 0, -1).float().expand(m, of)
    return torch.multinomial(odds, top_k, generator=generator).to(torch.int32)


ROUTINGS = {
    "one token": random_ids(1, 2),
    "top 1": random_ids(9, 1),
    "top 8, uneven": random_ids(3, 8, of=11),
    "all on one": torch.full((17, 1), 3, dtype=torch.int32),
    "most are empty": torch.tensor([[4, 0]] * 6, dtype=torch.int32),
    "some elsewhere": torch.tensor([[0, -1], [-1, -1], [-1, 3], [3, 0]], dtype=torch.int32),
    "all elsewhere": torch.full((3, 2), -1, dtype=torch.int32),
}


@dataclasses.dataclass
class Stack:
    """A projection of every expert: what is stored, and what the kernels read."""

    stored: list[dict[str, torch.Tensor]]
    prepared: dict[str, torch.Tensor]


def stack(scheme: str, of: int, n: int, k: int, dtype: torch.dtype) -> Stack:
    cases = [make(scheme, expert + 1, n, k, dtype) for expert in range(of)]
    names = cases[0].prepared
    prepared = {name: torch.stack([case.prepared[name] for case in cases]) for name in names}
    return Stack([case.stored for case in cases], prepared)


def random_x(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)


def random_routing(ids: torch.Tensor) -> torch.Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("block_m", [4, 16])
def test_slots_are_sorted_into_blocks(name: str, block_m: int) -> None:
    ids = ROUTINGS[name].to(DEVICE)
    of = 11 if "8" in name else EXPERTS
    blocks = expert_blocks.sort_slots(ids, of, block_m)
    place, found = 0, []
    for expert in range(of):
        slots = torch.nonzero(ids.flatten() == expert).flatten().tolist()
        assert blocks.slots[place : place + len(slots)].tolist() == slots
        last = place + len(slots)
        found += [[expert, first, last] for first in range(place, last, block_m)]
        place = last
    table = blocks.table.tolist()
    assert table[: len(found)] == found
    assert all(row[0] == -1 for row in table[len(found) :])


def test_most_blocks_are_enough_and_no_more() -> None:
    """Of any division of slots among experts; the worst one leaves no block over."""
    for slots, of, block_m in ((1, 5, 4), (9, 3, 4), (64, 7, 8), (5, 128, 16)):
        used = min(slots, of)
        worst = [1] * (used - 1) + [slots - used + 1]
        most = expert_blocks.most_blocks(slots, of, block_m)
        assert most == sum(-(-count // block_m) for count in worst)


def test_many_slots_take_several_chunks() -> None:
    ids = random_ids(700, 3).to(DEVICE)  # 2,100 slots
    blocks = expert_blocks.sort_slots(ids, EXPERTS, 16)
    assert torch.equal(blocks.slots, torch.sort(ids.flatten(), stable=True).indices.int())
    real = blocks.table[blocks.table[:, 0] >= 0].tolist()
    assert all(ids.flatten()[blocks.slots[first]] == expert for expert, first, _ in real)


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize(("scheme", "tile"), EVERY_TILE)
@pytest.mark.parametrize(("n", "k"), [(77, 256), (131, 288)])
def test_every_kind_of_grouped_tile(scheme: str, tile: Tile, n: int, k: int, use_ptx: bool) -> None:
    """An odd N, a shorter last group, an odd number of groups; a slot that is elsewhere."""
    dtype = DTYPES[n % 2]
    weights = stack(scheme, 3, n, k, dtype)
    ids = random_ids(7, 2, of=3)
    ids[2, 1] = -1
    ids, x, routing = ids.to(DEVICE), random_x(7, k, dtype), random_routing(ids)
    blocks = expert_blocks.sort_slots(ids, 3, tile.block_m)
    oracle = reference.w3a16_linear if scheme == "w3a16" else reference.w4a8_linear
    given = experts.activations(scheme, x, tile)
    for weighted in (True,) if n == 131 else (True, False):
        got = experts.product(
            scheme, given, weights.prepared, n, k, blocks, 2, routing if weighted else None, dtype,
            tile, use_ptx,
        ).view(7, 2, n)  # fmt: skip
        assert got[2, 1].isnan().all(), "a row of another rank's expert was written"
        for expert in range(3):
            tokens, choice = torch.nonzero(ids == expert, as_tuple=True)
            expected = oracle(x[tokens], *weights.stored[expert].values())
            expected *= routing[tokens, choice, None] if weighted else 1
            assert_close(got[tokens, choice], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
def test_layer_matches_the_oracle(activation: str, scheme: str, name: str) -> None:
    """Through the op, with the tile that the number of slots asks for."""
    ids, of = ROUTINGS[name].to(DEVICE), 11 if "8" in name else EXPERTS
    dtype = DTYPES[len(name) % 2]
    gate_up = stack(scheme, of, 2 * INTER, HIDDEN, dtype)
    down = stack(scheme, of, HIDDEN, INTER, dtype)
    x, routing = random_x(len(ids), HIDDEN, dtype), random_routing(ids)
    given = gate_up.prepared, down.prepared, INTER, activation
    got = experts.apply(scheme, x, routing, ids, *given)
    assert got.dtype == dtype
    if name == "all elsewhere":
        assert not got.any()
        return
    expected = reference.experts(x, routing, ids, gate_up.stored, down.stored, scheme, activation)
    # What lies between the two linears, and each expert's part, is rounded as well; a code of w4a8
    # may be the next where a rounding in between went the other way.
    assert_close(got, expected, 2 * TOLERANCE[dtype])
    if name == "some elsewhere":
        assert not got[1].any()


@pytest.mark.parametrize(
    ("scheme", "tile"),
    [("w3a16", TILES["w3a16"]["halves"]), ("w4a8", TILES["w4a8"]["narrow"])],
    ids=["w3a16", "w4a8"],
)
def test_a_token_does_not_depend_on_the_others(scheme: str, tile: Tile) -> None:
    """Bit for bit: alone, and in a batch whose blocks are others."""
    gate_up = stack(scheme, EXPERTS, 2 * INTER, HIDDEN, torch.float16)
    down = stack(scheme, EXPERTS, HIDDEN, INTER, torch.float16)
    ids = random_ids(6, 2).to(DEVICE)
    x, routing = random_x(6, HIDDEN, torch.float16), random_routing(ids)

    def run(tokens: slice) -> torch.Tensor:
        return experts.run(
            scheme, x[tokens].contiguous(), routing[tokens].contiguous(), ids[tokens].contiguous(),
            gate_up.prepared, down.prepared, INTER, "silu", tile, not INTERPRETED,
        )  # fmt: skip

    assert torch.equal(run(slice(None))[3:4], run(slice(3, 4)))


@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_experts_in_every_order_of_inputs(
    orders: launch.Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "orders", lambda device: orders)
    gate_up = stack("w3a16", 2, 2 * INTER, HIDDEN, torch.float16)
    down = stack("w3a16", 2, HIDDEN, INTER, torch.float16)
    ids = random_ids(3, 1, of=2).to(DEVICE)
    x, routing = random_x(3, HIDDEN, torch.float16), random_routing(ids)
    expected = reference.experts(x, routing, ids, gate_up.stored, down.stored, "w3a16")
    for name in ("halves-narrow", "many"):
        got = experts.run(
            "w3a16", x, routing, ids, gate_up.prepared, down.prepared, INTER, "silu",
            TILES["w3a16"][name], not INTERPRETED,
        )  # fmt: skip
        assert_close(got, expected, 2 * TOLERANCE[torch.float16])


def test_no_tokens_and_other_dtypes_of_the_router() -> None:
    gate_up = stack("w4a8", 2, 2 * INTER, HIDDEN, torch.bfloat16).prepared
    down = stack("w4a8", 2, HIDDEN, INTER, torch.bfloat16).prepared
    ids, x = random_ids(2, 1, of=2).to(DEVICE), random_x(2, HIDDEN, torch.bfloat16)
    routing = torch.ones(2, 1, device=DEVICE)
    given = gate_up, down, INTER, "silu"
    got = experts.apply("w4a8", x, routing, ids, *given)
    other = experts.apply("w4a8", x, routing.bfloat16(), ids.long(), *given)
    assert torch.equal(got, other)
    none = experts.apply("w4a8", x[:0], routing[:0], ids[:0], *given)
    assert none.shape == (0, HIDDEN)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs and inductor need a GPU")
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("m", [1, 33, 300])
def test_a_cuda_graph_holds_any_routing(scheme: str, m: int) -> None:
    gate_up = stack(scheme, EXPERTS, 2 * INTER, HIDDEN, torch.bfloat16).prepared
    down = stack(scheme, EXPERTS, HIDDEN, INTER, torch.bfloat16).prepared
    x = random_x(m, HIDDEN, torch.bfloat16)

    def call(x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return experts.apply(scheme, x, routing, ids, gate_up, down, INTER, "silu")

    ids = random_ids(m, 2).to(DEVICE)
    routing = random_routing(ids)
    call(x, routing, ids)
    assert torch.equal(torch.compile(call, fullgraph=True)(x, routing, ids), call(x, routing, ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, routing, ids)
    for other in (random_ids(m, 2, seed=7), torch.tensor([[4, 0]] * m, dtype=torch.int32)):
        ids.copy_(other)
        graph.replay()
        assert torch.equal(out, call(x, routing, ids))
