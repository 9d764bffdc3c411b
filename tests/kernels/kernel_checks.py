"""Every kernel against the fp32 oracle: collected by test_interpreted.py and test_gpu.py.

Needs a CUDA device or TRITON_INTERPRET=1 from the start of the process, so pytest does not collect
this file by itself. On a GPU both unpacking paths run, PTX and its twin; interpreted, the twin.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from poison import poison, poison_allocations

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import (
    halves,
    launch,
    layout,
    ops,
    quantize_activation,
    reference,
    tiles,
    tuning,
    w3a16,
    w3a16_dequantize,
    w4a8,
)
from qig_serve.kernels.library import LinearJob
from qig_serve.kernels.tiles import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter  # noqa: F401

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PTX = [False] if INTERPRETED else [True, False]
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # half a unit in the last place, about

TILES = {
    "w3a16": {
        "halves": Tile("halves", 8, 128, num_stages=2, programs_per_sm=3),
        "halves-narrow": Tile("halves", 4, 64, 2, num_stages=2, programs_per_sm=4),
        "halves-warp": Tile("halves", 8, 32, 1, num_stages=2, programs_per_sm=8),
        "halves-wide": Tile("halves", 16, 256, num_stages=2, programs_per_sm=1),
        "split": Tile("split_k", 32, 128, num_stages=2, programs_per_sm=3),
        "stream": Tile("stream_k", 16, 128, num_stages=2),
        "stream-wide": Tile("stream_k", 64, 256, 8, num_stages=2, programs_per_sm=1),
        "prefill": Tile("prefill", 64, 256, 8, num_stages=2),
        "prefill-narrow": Tile("prefill", 64, 128, num_stages=2, group_m=2),
        "dequantize": Tile("dequantize", block_n=0),
        "dequantize-sliced": Tile("dequantize", block_n=128),
    },
    "w4a8": {
        "split": Tile("split_k", 16, 128, num_stages=3, programs_per_sm=4),
        "split-narrow": Tile("split_k", 8, 32, 1, num_stages=3, programs_per_sm=8),
        "split-wide": Tile("split_k", 16, 256, num_stages=3),
        "stream": Tile("stream_k", 16, 128, num_stages=3),
        "stream-wide": Tile("stream_k", 64, 128, num_stages=2, programs_per_sm=1),
        "prefill": Tile("prefill", 64, 256, 8, num_stages=2),
        "prefill-narrow": Tile("prefill", 64, 128, num_stages=2, group_m=2),
    },
}
EVERY_TILE = [
    pytest.param(scheme, tile, id=f"{scheme}-{name}")
    for scheme, tiles in TILES.items()
    for name, tile in tiles.items()
]
SHARED = [param for param in EVERY_TILE if param.values[1].regime in tiles.SHARED]
ORDERS = [launch.Orders(16, 16, 8), launch.Orders(16, 16, 16), launch.Orders(32, 4, 4)]
if INTERPRETED or launch.orders_of((8, 0)).activations == 32:  # compiled by 3.6 it is wrong
    ORDERS.append(launch.Orders(32, 32, 32))


# (M, N, K): odd N, K of one group, of an odd number of them (a tensor-parallel shard), of several
SHAPES = [(1, 77, 1024), (7, 129, 384), (16, 257, 128), (63, 130, 384), (256, 131, 128)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the kernels allocate is full of NaN (integers: their largest): unwritten places show."""
    poison_allocations(monkeypatch)
    poison(launch.scratch(DEVICE).partials.view(torch.float32))  # allocated once, used by all
    yield
    assert not launch.scratch(DEVICE).counters.any(), "counters must be left at zero"


@dataclasses.dataclass
class Linear:
    """A random quantized linear: what is stored, and what the kernels read."""

    stored: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]
    x: torch.Tensor
    bias: torch.Tensor

    def expected(self, scheme: str, bias: torch.Tensor | None) -> torch.Tensor:
        oracle = reference.w3a16_linear if scheme == "w3a16" else reference.w4a8_linear
        return oracle(self.x, *self.stored.values(), bias)


def make(scheme_name: str, m: int, n: int, k: int, dtype: torch.dtype) -> Linear:
    scheme = SCHEMES[scheme_name]
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    weight = torch.randn(n, k, generator=generator) * 0.05
    weight[:, : k // 2] += 0.03  # so that zero points differ
    scale, zero = packing.minmax_params(weight, scheme, packing.scale_dtype(scheme, dtype))
    codes = packing.quantize(weight, scale, zero, scheme)
    if zero is not None:  # every zero point and every code
        zero = torch.randint(0, 8, zero.shape, generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 8, codes.shape, generator=generator, dtype=torch.uint8)
    stored = packing.pack_linear(codes, scale, zero, scheme, dtype)
    stored = {name: tensor.to(DEVICE) for name, tensor in stored.items()}
    x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(n, generator=generator).to(DEVICE, dtype)
    return Linear(stored, ops.prepare(scheme, stored, dtype), x, bias)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative RMS; NaN never passes."""
    assert got.shape == expected.shape
    error = float((got.float() - expected).norm() / expected.norm())
    assert error < tolerance, f"relative error {error:.2e}"


def run(
    scheme: str, case: Linear, n: int, bias: torch.Tensor | None, tile: Tile, use_ptx: bool
) -> torch.Tensor:
    scratch = launch.scratch_for(tile, DEVICE)
    got = ops.KERNELS[scheme].linear(case.x, case.prepared, n, bias, tile, scratch, use_ptx)
    assert not scratch.counters.any(), "counters must be left at zero"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_linear_matches_the_oracle(scheme: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    case = make(scheme, m, n, k, dtype)
    got = ops.linear(SCHEMES[scheme], case.x, case.prepared, n, k, case.bias)
    assert got.dtype == dtype
    assert_close(got, case.expected(scheme, case.bias), TOLERANCE[dtype])


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize(("scheme", "tile"), EVERY_TILE)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 77, 256), (19, 300, 384), (130, 131, 384)])
def test_every_kind_of_tile(scheme: str, tile: Tile, m: int, n: int, k: int, use_ptx: bool) -> None:
    if INTERPRETED and m > 35 and tile.block_m <= 16 and tile.regime != "dequantize":
        pytest.skip("hundreds of programs, one after the other")
    for dtype in DTYPES[n % 2 :][:1] if INTERPRETED else DTYPES:  # each with another shape
        case = make(scheme, m, n, k, dtype)
        got = run(scheme, case, n, case.bias, tile, use_ptx)
        assert_close(got, case.expected(scheme, case.bias), TOLERANCE[dtype])


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize(("m", "k"), [(1, 96), (3, 576), (40, 960)])
@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("w3a16", "halves"), ("w3a16", "stream"), ("w3a16", "prefill"), ("w3a16", "dequantize"),
        ("w4a8", "split"), ("w4a8", "prefill"),
    ],
)  # fmt: skip
def test_a_shorter_last_group(scheme: str, name: str, m: int, k: int, use_ptx: bool) -> None:
    """128 does not divide K: what lies behind a row of x, NaN or the next row, does not count."""
    if INTERPRETED and m > 35 and name in ("halves", "stream", "split"):
        pytest.skip("hundreds of programs, one after the other")
    case = make(scheme, m, 77, k, torch.bfloat16)
    behind = torch.full((m * k + 128,), torch.nan, dtype=case.x.dtype, device=DEVICE)
    case.x = behind[: m * k].view(m, k).copy_(case.x)
    got = run(scheme, case, 77, case.bias, TILES[scheme][name], use_ptx)
    assert_close(got, case.expected(scheme, case.bias), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("orders", ORDERS, ids=str)
@pytest.mark.parametrize("name", ["halves", "halves-narrow", "stream", "dequantize"])
def test_every_order_of_inputs(
    name: str, orders: launch.Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other GPUs and Tritons are right as well, if not fast."""
    monkeypatch.setattr(launch, "orders", lambda device: orders)
    m, n, k = 5, 130, 640
    # Interpreted, each with other orders: what an order decides is the same in both.
    for dtype in DTYPES[ORDERS.index(orders) % 2 :][:1] if INTERPRETED else DTYPES:
        case = make("w3a16", m, n, k, dtype)
        got = run("w3a16", case, n, None, TILES["w3a16"][name], not INTERPRETED)
        assert_close(got, case.expected("w3a16", None), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("m", "splits"), [(9, 1), (9, 2), (9, 3), (9, 5), (1, 3), (8, 5), (23, 2), (23, 5)]
)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_any_number_of_splits(
    scheme: str, m: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 pairs or 10 blocks, so that parts are uneven."""
    monkeypatch.setattr(
        launch, "programs", lambda tile, output_tiles, blocks, sms: output_tiles * splits
    )
    n, k = 130, 1280
    case = make(scheme, m, n, k, torch.float16)
    tile = TILES[scheme]["halves" if scheme == "w3a16" else "split"]
    tiles = -(-m // tile.block_m) * 2
    scratch = launch.allocate(tiles * splits * tile.block_m * tile.block_n, DEVICE)
    got = ops.KERNELS[scheme].linear(
        case.x, case.prepared, n, case.bias, tile, scratch, not INTERPRETED
    )
    assert_close(got, case.expected(scheme, case.bias), TOLERANCE[torch.float16])


@pytest.mark.parametrize("count", [1, 2, 7, 11, 20])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_any_number_of_shares(scheme: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares that end anywhere: of 6 tiles with 5 groups each, down to one and a half a program."""
    monkeypatch.setattr(launch, "programs", lambda *_: count)
    m, n, k = 17, 300, 640
    case = make(scheme, m, n, k, torch.float16)
    tile = TILES[scheme]["stream"]
    scratch = launch.allocate(2 * count * tile.block_m * tile.block_n, DEVICE)
    got = ops.KERNELS[scheme].linear(case.x, case.prepared, n, None, tile, scratch, not INTERPRETED)
    assert_close(got, case.expected(scheme, None), TOLERANCE[torch.float16])
    assert not scratch.counters.any()


def as_fp64(case: Linear) -> torch.Tensor:
    weight = packing.unpack_linear(case.stored, SCHEMES["w3a16"]).double()
    return case.x.double() @ weight.t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "outlier", "zeros", "tiny", "large"])
def test_halves_are_as_exact_as_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Against fp64, by token: no further off than products in 16 bits, whatever the input."""
    m, n, k = 8, 256, 1024
    case = make("w3a16", m, n, k, dtype)
    if kind == "outlier":
        case.x[:, 77] *= 10_000 if dtype == torch.bfloat16 else 5_000
    elif kind == "zeros":
        case.x[::2] = 0
    elif kind == "tiny":
        case.x *= 2.0**-20 if dtype == torch.bfloat16 else 2.0**-9
    elif kind == "large":
        case.x *= 2.0**60 if dtype == torch.bfloat16 else 64
    exact = as_fp64(case)
    got = run("w3a16", case, n, None, TILES["w3a16"]["halves"], not INTERPRETED).double()
    other = run("w3a16", case, n, None, TILES["w3a16"]["dequantize"], not INTERPRETED).double()

    def error(out: torch.Tensor) -> torch.Tensor:
        return (out - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300)

    # By chance a token is rounded a little worse here than there. In fp16, whose own rounding is
    # finer, what an outlier costs the rest of its group shows: 6% more error.
    shows = kind == "outlier" and dtype == torch.float16
    assert bool((error(got) <= (1.3 if shows else 1.1) * error(other)).all())
    assert float((got - exact).norm()) <= (1.15 if shows else 1.02) * float((other - exact).norm())
    assert kind != "zeros" or not got[::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_token(dtype: torch.dtype) -> None:
    case = make("w3a16", 3, 130, 384, dtype)
    case.x[1, 200] = float("inf")
    got = run("w3a16", case, 130, None, TILES["w3a16"]["halves"], not INTERPRETED)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("m", [1, 7, 17])
@pytest.mark.parametrize("k", [384, 1024])
def test_eight_bit_weights(m: int, k: int) -> None:
    """As an output head has them: the same kernel, bytes for planes, one scale per row."""
    n = 300
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, 1, generator=generator) * 0.01
    orders = launch.orders(DEVICE)
    for dtype in DTYPES[k // 384 % 2 :][:1] if INTERPRETED else DTYPES:  # each with another K
        x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
        weight = layout.repack_w8a16(codes.to(DEVICE), scale.to(DEVICE), orders.activations)
        tile = TILES["w3a16"]["halves"]
        got = halves.product(
            *quantize_activation.split_halves(x), weight["weight_bytes"], weight["row_scale"],
            None, n, dtype, tile, launch.scratch_for(tile, DEVICE), not INTERPRETED,
        )  # fmt: skip
        exact = x.double().cpu() @ (codes.double() * scale.double()).t()
        assert_close(got.cpu(), exact, TOLERANCE[dtype])


def test_halves_sum_integers_exactly() -> None:
    """Integers in x, scales of one and fp32 out: a group's sum, below 2^24 here."""
    m, n, k = 5, 130, 128
    case = make("w3a16", m, n, k, torch.float16)
    case.stored["weight_scale"].fill_(1)
    prepared = ops.prepare(SCHEMES["w3a16"], case.stored, torch.float16)
    x = torch.randint(-1000, 1001, (m, k)).to(DEVICE, torch.float16)
    tile = TILES["w3a16"]["halves"]
    got = halves.product(
        *quantize_activation.split_halves(x), prepared["weight_planes"], prepared["scale_zero"],
        None, n, torch.float32, tile, launch.scratch_for(tile, DEVICE), not INTERPRETED,
    )  # fmt: skip
    weight = packing.unpack_linear(case.stored, SCHEMES["w3a16"]).double()
    exact = x.double() @ weight.t()
    # The zero point in a scale's last bits is worth 7 / 2^23 of it.
    assert float(((got.double() - exact).abs() / exact.abs().clamp(min=1)).max()) < 9e-7


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_exact_but_for_one_rounding(dtype: torch.dtype, use_ptx: bool) -> None:
    n, k = 129, 384
    case = make("w3a16", 3, n, k, dtype)
    p = case.prepared
    weight = w3a16_dequantize.dequantize(p["weight_planes"], p["scale_zero"], n, k, dtype, use_ptx)
    exact = packing.unpack_linear(case.stored, SCHEMES["w3a16"])
    assert torch.equal(weight, exact.to(dtype))


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize("tile", TILES["w4a8"].values(), ids=TILES["w4a8"].keys())
def test_w4a8_integer_product_is_exact(tile: Tile, use_ptx: bool) -> None:
    """With unit scales and fp32 out, the output is the integer sum, below 2^24 here."""
    m, n, k = 17, 130, 1024
    case = make("w4a8", m, n, k, torch.bfloat16)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8).to(DEVICE)
    ones = torch.ones(m, device=DEVICE)
    sixteenth = torch.full_like(case.prepared["channel_scale"], 1 / 16)
    prepared = {**case.prepared, "channel_scale": sixteenth}
    got = w4a8.product(
        codes, ones, prepared, n, None, torch.float32, tile, launch.scratch_for(tile, DEVICE),
        use_ptx,
    )  # fmt: skip
    expected = reference.int_product(codes.cpu(), case.stored["weight_packed"].cpu())
    assert torch.equal(got.cpu().to(torch.int64), expected)


@pytest.mark.parametrize(("scheme", "tile"), SHARED)
def test_shared_sums_do_not_depend_on_order(scheme: str, tile: Tile) -> None:
    """Twice the same launch, bit for bit; and the same again with other rows in the batch."""
    n, k = 130, 1024
    case = make(scheme, 5, n, k, torch.float16)
    first = run(scheme, case, n, None, tile, not INTERPRETED)
    if not INTERPRETED:  # there, programs run one after the other
        assert torch.equal(run(scheme, case, n, None, tile, True), first)
    case.x = case.x[:2].contiguous()
    assert torch.equal(run(scheme, case, n, None, tile, not INTERPRETED), first[:2])


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_launch_allocates_nothing_but_activations(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums go to the scratch memory that `prepare` left, before memory was profiled."""
    m, n, k = 3, 130, 1024
    case = make(scheme, m, n, k, torch.bfloat16)
    scratch = launch.scratch(DEVICE)
    before = scratch.partials.clone()
    allocated: list[torch.Size] = []
    empty = torch.empty

    def recorded(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        allocated.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    ops.linear(SCHEMES[scheme], case.x, case.prepared, n, k, None)
    halved = [(m, 2, k), (k // 256, m, 2)] if scheme == "w3a16" else [(m, k), (m,)]
    assert allocated == [*halved, (m, n)]
    assert launch.scratch(DEVICE) is scratch
    assert not torch.equal(scratch.partials, before), "K was not split: the test shows nothing"


def test_little_scratch_memory_is_refused() -> None:
    case = make("w3a16", 3, 130, 1024, torch.bfloat16)
    small = launch.allocate(8, DEVICE)
    with pytest.raises(ValueError, match="partial sums do not fit scratch memory for 8"):
        w3a16.linear(
            case.x, case.prepared, 130, None, TILES["w3a16"]["halves"], small, not INTERPRETED
        )


def test_leading_dimensions_and_no_rows() -> None:
    case = make("w3a16", 6, 77, 128, torch.bfloat16)
    scheme = SCHEMES["w3a16"]
    whole = ops.linear(scheme, case.x, case.prepared, 77, 128, None)
    shaped = ops.linear(scheme, case.x.reshape(2, 3, 128), case.prepared, 77, 128, None)
    assert torch.equal(shaped.reshape(6, 77), whole)
    assert ops.linear(scheme, case.x[:0], case.prepared, 77, 128, None).shape == (0, 77)


def test_unaligned_input() -> None:
    case = make("w3a16", 4, 77, 128, torch.bfloat16)
    buffer = torch.zeros(4 * 128 + 1, dtype=torch.bfloat16, device=DEVICE)
    shifted = buffer[1:].reshape(4, 128).copy_(case.x)
    scheme = SCHEMES["w3a16"]
    assert torch.equal(
        ops.linear(scheme, shifted, case.prepared, 77, 128, None),
        ops.linear(scheme, case.x, case.prepared, 77, 128, None),
    )


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_tuning_keeps_the_fastest_tile_of_a_bucket(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [Tile("split_k", 32, 128, num_stages=2), Tile("stream_k", 16, 128, num_stages=2)]
    narrow = TILES[scheme]["prefill-narrow"]
    times = iter([9.0, 7.0, 5.0])

    def timed(calls: list[Callable[[], torch.Tensor]]) -> float:
        assert not any(call().isnan().any() for call in calls)
        return next(times)

    monkeypatch.setattr(tuning, "copies", lambda tensors: [tensors, tensors])
    monkeypatch.setattr(tuning, "time_microseconds", timed)
    rows = tuning.measure(SCHEMES[scheme], 130, 128, {1: tiles, 70: [narrow]}, DEVICE)
    assert rows == [
        {"max_m": 1, **dataclasses.asdict(tiles[1])},
        {"max_m": None, **dataclasses.asdict(narrow)},
    ]


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs and inductor need a GPU")
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("m", [1, 33, 200])
def test_cuda_graph_and_torch_compile(scheme: str, m: int) -> None:
    n, k = 300, 384
    case = make(scheme, m, n, k, torch.bfloat16)
    ops.warm_up(LinearJob(SCHEMES[scheme], n, k, torch.bfloat16, torch.device("cuda", 0)))

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(SCHEMES[scheme], x, case.prepared, n, k, case.bias)

    expected = call(case.x)
    assert torch.equal(torch.compile(call, fullgraph=True)(case.x), expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(case.x)
    with torch.cuda.graph(graph):
        out = call(static)
    static.copy_(case.x)
    graph.replay()
    assert torch.equal(out, expected)
