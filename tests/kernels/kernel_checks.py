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

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import launch, ops, quantize_activation, reference, tuning, w3a16, w4a8
from qig_serve.kernels.tuning import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter  # noqa: F401

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PTX = [False] if INTERPRETED else [True, False]
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # half a unit in the last place, about

TILES = {
    "split": Tile("split_k", 16, 256, num_stages=3),
    "split-narrow": Tile("split_k", 16, 128, num_stages=3),
    "split-wide": Tile("split_k", 64, 128, num_stages=2, programs_per_sm=1),
    "unsplit": Tile("split_k", 16, 128, num_stages=3, programs_per_sm=0),
    "prefill": Tile("prefill", 64, 256, 8, num_stages=2),
    "prefill-narrow": Tile("prefill", 64, 128, num_stages=2, group_m=2),
}

# (M, N, K): odd N, K of one group, of an odd number of them (a tensor-parallel shard), of several
SHAPES = [(1, 77, 1024), (7, 129, 384), (16, 257, 128), (63, 130, 384), (256, 131, 128)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty full of NaN (integers: their largest), so that what is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    poison(ops.workspace(DEVICE).view(torch.float32))  # allocated once, used by all
    yield


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


def workspace(tile: Tile) -> torch.Tensor:
    return torch.empty(launch.workspace_size(tile, DEVICE), dtype=torch.int32, device=DEVICE)


def run(
    scheme: str, case: Linear, n: int, bias: torch.Tensor | None, tile: Tile, use_ptx: bool
) -> torch.Tensor:
    p, x = case.prepared, case.x
    if scheme == "w3a16":
        return w3a16.linear(
            x, p["weight_lanes"], p["scale_zero"], p["counters"], workspace(tile), bias, n, tile,
            use_ptx,
        )  # fmt: skip
    codes, token_scale = quantize_activation.quantize(x)
    return w4a8.linear(
        codes, token_scale, p["weight_nibbles"], p["channel_scale"], p["counters"],
        workspace(tile), bias, n, x.dtype, tile, use_ptx,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_linear_matches_the_oracle(scheme: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    case = make(scheme, m, n, k, dtype)
    got = ops.linear(SCHEMES[scheme], case.x, case.prepared, n, k, case.bias)
    assert got.dtype == dtype
    assert_close(got, case.expected(scheme, case.bias), TOLERANCE[dtype])
    assert not case.prepared["counters"].any(), "counters must be left at zero"


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_every_kind_of_tile(scheme: str, tile: Tile, use_ptx: bool) -> None:
    m, n, k = 35, 300, 384
    for dtype in DTYPES:
        case = make(scheme, m, n, k, dtype)
        got = run(scheme, case, n, None, tile, use_ptx)
        assert_close(got, case.expected(scheme, None), TOLERANCE[dtype])


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_exact_but_for_one_rounding(dtype: torch.dtype, use_ptx: bool) -> None:
    n, k = 129, 256
    case = make("w3a16", 3, n, k, dtype)
    p = case.prepared
    weight = w3a16.dequantize(p["weight_lanes"], p["scale_zero"], n, dtype, use_ptx)
    exact = packing.unpack_linear(case.stored, SCHEMES["w3a16"])
    assert torch.equal(weight, exact.to(dtype))
    got = run("w3a16", case, n, case.bias, Tile("dequantize"), use_ptx)
    assert_close(got, case.expected("w3a16", case.bias), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("use_ptx", PTX)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
def test_w4a8_integer_product_is_exact(tile: Tile, use_ptx: bool) -> None:
    """With unit scales and fp32 out, the output is the integer sum, below 2^24 here."""
    m, n, k = 17, 130, 1024
    case = make("w4a8", m, n, k, torch.bfloat16)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8).to(DEVICE)
    ones = torch.ones(m, device=DEVICE)
    sixteenth = torch.full_like(case.prepared["channel_scale"], 1 / 16)
    got = w4a8.linear(
        codes, ones, case.prepared["weight_nibbles"], sixteenth, case.prepared["counters"],
        workspace(tile), None, n, torch.float32, tile, use_ptx,
    )  # fmt: skip
    expected = reference.int_product(codes.cpu(), case.stored["weight_packed"].cpu())
    assert torch.equal(got.cpu().to(torch.int64), expected)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_split_sums_do_not_depend_on_order(scheme: str) -> None:
    """Twice the same launch, bit for bit; and the same again with other rows in the batch."""
    n, k = 130, 1024
    case = make(scheme, 5, n, k, torch.float16)
    first = run(scheme, case, n, None, TILES["split"], not INTERPRETED)
    again = run(scheme, case, n, None, TILES["split"], not INTERPRETED)
    assert torch.equal(first, again)
    case.x = case.x[:2].contiguous()
    assert torch.equal(run(scheme, case, n, None, TILES["split"], not INTERPRETED), first[:2])


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_decode_allocates_nothing_but_its_output(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums go to the workspace that `prepare` left, before memory was profiled."""
    m, n, k = 3, 130, 1024
    case = make(scheme, m, n, k, torch.bfloat16)
    scratch = ops.workspace(DEVICE)
    before = scratch.clone()
    codes, token_scale = quantize_activation.quantize(case.x)
    allocated: list[torch.Size] = []
    empty = torch.empty

    def recorded(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        allocated.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    p = case.prepared
    if scheme == "w3a16":
        torch.ops.qig.w3a16_linear(
            case.x, p["weight_lanes"], p["scale_zero"], p["counters"], None, n
        )
    else:
        torch.ops.qig.w4a8_linear(
            codes, token_scale, p["weight_nibbles"], p["channel_scale"], p["counters"], None, n,
            torch.bfloat16,
        )  # fmt: skip
    assert allocated == [(m, n)]
    assert ops.workspace(DEVICE) is scratch
    assert not torch.equal(scratch, before), "K was not split: the test shows nothing"


def test_a_small_workspace_is_refused() -> None:
    case = make("w3a16", 3, 130, 1024, torch.bfloat16)
    p, small = case.prepared, torch.empty(8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="partial sums do not fit a workspace of 8"):
        w3a16.linear(
            case.x, p["weight_lanes"], p["scale_zero"], p["counters"], small, None, 130,
            TILES["split"], not INTERPRETED,
        )  # fmt: skip


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


def test_counters_suffice_for_every_tuned_tile() -> None:
    for (_, _, shape), rows in tuning.tile_table().items():
        for most, tile in rows:
            if tile.regime != "split_k":
                continue
            assert most <= tuning.DECODE_ROWS
            for n in (1, 129, 4608):
                tiles = -(-n // tile.block_n) * -(-int(most) // tile.block_m)
                assert tiles <= launch.counters(n, DEVICE).numel(), (shape, tile)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_tuning_keeps_the_fastest_tile_of_a_bucket(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {1: [TILES["split"], TILES["split-narrow"]], 70: [TILES["prefill-narrow"]]}
    times = iter([9.0, 7.0, 5.0])

    def timed(call: Callable[[], torch.Tensor]) -> float:
        assert not call().isnan().any()
        return next(times)

    monkeypatch.setattr(tuning, "candidates", lambda scheme, m: offered[m])
    monkeypatch.setattr(tuning, "time_microseconds", timed)
    rows = tuning.measure(SCHEMES[scheme], 130, 128, (1, 70), DEVICE)
    assert rows == [
        {"max_m": 1, **dataclasses.asdict(TILES["split-narrow"])},
        {"max_m": None, **dataclasses.asdict(TILES["prefill-narrow"])},
    ]


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs and inductor need a GPU")
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("m", [1, 33, 200])
def test_cuda_graph_and_torch_compile(scheme: str, m: int) -> None:
    n, k = 300, 384
    case = make(scheme, m, n, k, torch.bfloat16)
    ops.warm_up(SCHEMES[scheme], n, k, torch.bfloat16, torch.device("cuda", 0))

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
