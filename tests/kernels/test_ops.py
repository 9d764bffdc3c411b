"""The ops' frame: what is refused, shapes under tracing, tiles, and tuning without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qig_serve import packing
from qig_serve.formats import SCHEMES, VOCABULARY_SCHEME, get_scheme
from qig_serve.kernels import cpu, experts, launch, ops, tiles, tuning

W3A16, W4A8 = get_scheme("w3a16"), get_scheme("w4a8")
HOPPER = (9, 0)


@pytest.mark.parametrize("scheme", [W3A16, W4A8], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
)
def test_layer_shapes_are_taken(scheme: object, capability: tuple[int, int]) -> None:
    for layer in tiles.LAYER_SHAPES.values():
        for n, k in layer.values():
            for dtype in (torch.bfloat16, torch.float16):
                assert ops.can_implement(scheme, n, k, dtype, capability) == (True, "")


@pytest.mark.parametrize(
    ("scheme", "n", "k", "dtype", "capability", "reason"),
    [
        (SCHEMES["w2a16"], 128, 128, torch.bfloat16, HOPPER, "no GPU kernel for scheme w2a16"),
        (W3A16, 128, 128, torch.bfloat16, None, "need a CUDA device"),
        (W3A16, 128, 128, torch.bfloat16, (7, 5), "8.0 or newer, this one has 7.5"),
        (W3A16, 128, 128, torch.bfloat16, (11, 0), "no tiles for compute capability 11.0"),
        (W4A8, 128, 128, torch.float32, HOPPER, "bfloat16 or float16, not torch.float32"),
        (W3A16, 128, 200, torch.bfloat16, HOPPER, "that 32 divides, got K=200"),
        (W4A8, 0, 128, torch.bfloat16, HOPPER, "positive sizes"),
        (W3A16, 1 << 20, 1 << 12, torch.bfloat16, HOPPER, "below 2^31"),
        (W4A8, 128, 1 << 17, torch.bfloat16, HOPPER, "at most K=65536"),
    ],
)
def test_refusals_say_why(
    scheme: object, n: int, k: int, dtype: torch.dtype, capability: tuple[int, int], reason: str
) -> None:
    possible, why = ops.can_implement(scheme, n, k, dtype, capability)
    assert not possible and reason in why


@pytest.mark.parametrize("scheme", [W3A16, W4A8], ids=lambda s: s.name)
def test_fake_linear_has_the_real_shape(scheme: object) -> None:
    n, k = 77, 256
    codes = torch.zeros(n, k, dtype=torch.int8 if scheme.symmetric else torch.uint8)
    scale, zero = packing.minmax_params(torch.randn(n, k), scheme)
    prepared = ops.prepare(
        scheme, packing.pack_linear(codes, scale, zero, scheme, torch.float16), torch.float16
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in prepared.items()}
        x = torch.empty(2, 5, k, dtype=torch.float16)
        out = ops.linear(scheme, x, fakes, n, k, torch.empty(n, dtype=torch.float16))
        assert out.shape == (2, 5, n) and out.dtype == torch.float16
        flat = x.reshape(-1, k)
        codes, token_scale = torch.ops.qig.quantize_activation(flat)
        assert codes.shape == (10, k) and codes.dtype == torch.int8
        assert token_scale.shape == (10,) and token_scale.dtype == torch.float32
        norm = torch.ops.qig.rms_norm_quantize(flat, flat[0], 1e-6, flat)
        assert [t.shape for t in norm] == [(10, k), (10,), (10, k)]
        silu = torch.ops.qig.silu_mul_quantize(flat)
        assert [t.shape for t in silu] == [(10, k // 2), (10,)]


def test_fake_experts_have_the_real_shape() -> None:
    with FakeTensorMode():
        x, routing = torch.empty(3, 160, dtype=torch.float16), torch.empty(3, 2)
        ids = torch.empty(3, 2, dtype=torch.int32)
        stack = {"weight": torch.empty(5, 1, 2, 64), "scale": torch.empty(5, 2)}  # is not read
        out = experts.apply("w4a8", x, routing, ids, stack, stack, 96, "silu")
        assert out.shape == x.shape and out.dtype == x.dtype


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_tiles_of_experts_grow_with_their_slots(scheme: str) -> None:
    chosen = [experts.select(scheme, 8 * m, 128).block_m for m in (1, 64, 256, 512, 2048, 8192)]
    assert chosen == sorted(chosen) and chosen[0] <= 8 and chosen[-1] == 128


def test_prepared_tensors_are_those_of_the_warm_up() -> None:
    """warm_up compiles for zeros in these shapes; they must be those that prepare makes."""
    for scheme in (W3A16, W4A8):
        n, k = 130, 384
        weight = torch.randn(n, k)
        scale, zero = packing.minmax_params(weight, scheme)
        codes = packing.quantize(weight, scale, zero, scheme)
        stored = packing.pack_linear(codes, scale, zero, scheme, torch.bfloat16)
        real = ops.prepare(scheme, stored, torch.bfloat16)
        warm = ops.KERNELS[scheme.name].zeros(n, k, torch.device("cpu"))
        assert {k: (t.shape, t.dtype) for k, t in real.items()} == {
            k: (t.shape, t.dtype) for k, t in warm.items()
        }


def test_schemes_and_kernel_modules_belong_together() -> None:
    """A served scheme has a module, for a GPU or a CPU; modules export what is asked of them."""
    served = {name for name, scheme in SCHEMES.items() if scheme.servable}
    assert served | {VOCABULARY_SCHEME.name} == {*ops.KERNELS, *cpu.KERNELS}
    wanted = {
        "prepare", "apply", "linear", "zeros", "warm_up", "candidates", "kernel", "unsupported",
        "FUSES_ACTIVATIONS",
    }  # fmt: skip
    on_cpu = {"prepare", "linear", "describe", "look_up"}
    for kernels, names in ((ops.KERNELS, wanted), (cpu.KERNELS, on_cpu)):
        for name, module in kernels.items():
            assert names <= set(dir(module)), name
    assert served & set(ops.KERNELS) == set(experts.TILES)
    assert set(ops.KERNELS) == {scheme for _, scheme, _ in tiles.tile_table()}


def test_tiles_cover_every_number_of_tokens() -> None:
    for (architecture, name, shape), rows in tiles.tile_table().items():
        limits = [most for most, _ in rows]
        assert limits == sorted(set(limits)) and limits[-1] == float("inf"), (architecture, shape)
        for m in (1, 16, 17, 64, 65, 8192, 100_000):
            tile = tiles.select(name, architecture, 4608, 3584, m)
            assert tile.regime not in ("halves", "split_k") or m <= 1024


SHARED = ("halves", "split_k", "stream_k")
SIZES = [(n, k) for layer in tiles.LAYER_SHAPES.values() for n, k in layer.values()]


@pytest.mark.parametrize("sms", [4, 84, 132])
def test_no_launch_needs_more_than_the_scratch_memory(sms: int) -> None:
    """For every tuned tile and odd shapes; and every unit of work is somebody's, once."""
    tuned = {t for rows in tiles.tile_table().values() for _, t in rows if t.regime in SHARED}
    assert len(tuned) > 3
    shared = 0
    for tile in tuned:
        for n, k in [*SIZES, (1, 128), (129, 384), (152064, 3584), (300, 18944)]:
            for m in (1, 17, 64, 1024):
                output_tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
                blocks = k // 128
                count = launch.programs(tile, output_tiles, blocks, sms)
                assert 1 <= count <= output_tiles * blocks
                assert output_tiles * blocks < 1 << 31, "32-bit numbers"
                if tile.regime != "stream_k":
                    assert count % output_tiles == 0, "no share may cross a tile"
                partials = torch.empty(launch.scratch_size(tile, sms), dtype=torch.int32)
                launch.Scratch(partials, partials).partial_sums(
                    tile, count, output_tiles, torch.float32
                )
                if count != output_tiles:
                    shared += 1
                    assert output_tiles <= launch.MOST_TILES
    assert shared > 10


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("output_tiles", "blocks"), [(1, 1), (3, 10), (28, 148), (296, 28)])
def test_every_unit_is_in_one_share(output_tiles: int, blocks: int, aligned: bool) -> None:
    """The arithmetic of sharing.share, in Python."""
    for count in (output_tiles, output_tiles * min(3, blocks), 264):
        if (aligned and count % output_tiles) or count > output_tiles * blocks:
            continue
        size, rest = launch.shares(count, output_tiles, blocks, aligned)
        end = 0
        for program in range(count):
            if aligned:
                start, part = program // size * blocks, program % size
                first, last = (start + p * blocks // size for p in (part, part + 1))
            else:
                first = program * size + min(program, rest)
                last = first + size + (program < rest)
            assert first == end and last > first
            end = last
        assert end == output_tiles * blocks


def test_work_is_even() -> None:
    """No 148 programs for 132 multiprocessors: at most an eighth more for one than for another."""
    for m in (1, 8, 64, 256):
        for scheme in ("w3a16", "w4a8"):
            for n, k in SIZES:
                tile = tiles.select(scheme, "sm_90", n, k, m)
                if tile.regime in SHARED:
                    output_tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
                    count = launch.programs(tile, output_tiles, k // 128, 132)
                    assert -(-count // 132) * 132 / count < 1.34, (scheme, n, k, m, count)
                    if output_tiles > 132:
                        assert -(-count // 132) * 132 / count < 1.125, (scheme, n, k, m, count)


def test_two_names_of_a_device_share_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert launch.scratch(cpu) is launch.scratch(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked: list[torch.device] = []
    monkeypatch.setattr(launch, "scratch_of", asked.append)
    for name in ("cuda", "cuda:1", "cuda:0"):
        launch.scratch(torch.device(name))
    assert asked == [torch.device("cuda", i) for i in (1, 1, 0)]


def test_warm_up_launches_every_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, with CUDA's calls taken out: each tile once, at its bucket's smallest M."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    device = torch.device("cuda", 0)
    for scheme in (W3A16, W4A8):
        found = ops.warm_up_tiles(scheme, 4608, 3584, device)
        buckets = tiles.buckets(scheme.name, "sm_90", 4608, 3584)
        assert [tile for tile, _ in found] == [tile for _, tile in buckets]
        for tile, m in found:
            assert tiles.select(scheme.name, "sm_90", 4608, 3584, m) == tile
            assert m == 1 or tiles.select(scheme.name, "sm_90", 4608, 3584, m - 1) != tile


def test_tuning_without_a_gpu_fails_in_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qig_serve.kernels.tuning"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "tuning measures kernels on a GPU, and no CUDA device was found\n"


def test_schemes_that_were_not_tuned_keep_their_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output head's, where decoder linears alone are timed."""
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"sm_90": {"source": "old", "w3a16": [1], "w8a16": [2]}}))
    monkeypatch.setattr(tuning, "TILES_FILE", path)
    tuning.write_tiles("sm_90", {"source": "new", "w3a16": [3]})
    assert json.loads(path.read_text())["sm_90"] == {"source": "new", "w3a16": [3], "w8a16": [2]}
