"""What the compiler makes of the kernels, without a GPU: spills, tensor cores, instructions."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qig_serve.formats import SCHEMES
from qig_serve.kernels import (
    compile_report,
    expert_times,
    experts,
    launch,
    ops,
    quantize_activation,
    sass,
    tiles,
    time_model,
    tuning,
)
from qig_serve.kernels.tiles import Tile

COUNTS = Path(__file__).parents[1] / "benchmarks" / "results" / "kernel-counts.json"


def tile_of(scheme: str, target: int, tokens: int = 1) -> Tile:
    rows = tiles.tile_table()[f"sm_{target}", scheme, "default"]
    return next(tile for most, tile in rows if tokens <= most)


@pytest.mark.parametrize(
    ("target", "tokens", "instruction"),
    [(90, 1, "mma"), (90, 64, "wgmma"), (80, 1, "mma"), (100, 1, "tcgen05"), (120, 1, "mma")],
)
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_tiles_stay_lean(scheme: str, target: int, tokens: int, instruction: str) -> None:
    """No spills, tensor cores, instructions per weight; all tiles of all targets are slow."""
    compiled = compile_report.compile_tile(
        scheme, target, tile_of(scheme, target, tokens), m=tokens
    )
    assert compiled.problems() == []
    assert compiled.counts.tensor_core.split()[0] == instruction


@pytest.mark.parametrize("slots", [8, 8192])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_grouped_kernels_stay_lean(scheme: str, slots: int) -> None:
    """Of 128 experts: what unpacks and multiplies is the linears'."""
    tile = experts.select(scheme, slots, 128)
    kernel = experts.kernel(scheme, tile, "bf16", launch.orders_for(90))
    compiled = compile_report.compile_kernel(kernel, scheme, 90, "bf16", True, int(slots == 8))
    assert compiled.problems() == []
    assert compiled.counts.tensor_core.split()[0] == ("mma" if slots == 8 else "wgmma")


def test_predicted_times_of_experts() -> None:
    """Blocks lie between those of full experts and one per expert more; more tokens take longer."""
    layer, gpu = expert_times.QWEN3_VL_30B_A3B, time_model.GPUS[90]
    assert expert_times.blocks(layer, 1, 4) == pytest.approx(8)
    assert 128 < expert_times.blocks(layer, 256, 16) < 2048 / 16 + 128
    times = [expert_times.sixteen_bits(layer, m, gpu) for m in (1, 16, 256, 8192)]
    assert times == sorted(times)


def test_a_shorter_last_group_is_masked_without_a_spill() -> None:
    """Compiled only where K is ragged; what whole groups compile has no more in it."""
    tile = next(tile for tile in tiles.tiles_of("sm_90", "w3a16", "prefill") if tile.block_m == 128)
    whole, ragged = (
        ops.KERNELS["w3a16"].kernel(tile, "bf16", launch.orders_for(90)) for _ in range(2)
    )
    assert whole.constants["RAGGED"] is False
    ragged.constants["RAGGED"] = True
    fewer, more = (sass.count(kernel, 90) for kernel in (whole, ragged))
    assert more.tensor_core.startswith("wgmma") and more.spills == 0
    assert fewer.integer < more.integer < 1.5 * fewer.integer


def test_twin_compiles_too() -> None:
    """The pure Triton path, which a GPU can run as well: correct, only slower."""
    for scheme in ("w3a16", "w4a8"):
        tile = tile_of(scheme, 90, 64)
        compiled = compile_report.compile_tile(scheme, 90, tile, "fp16", use_ptx=False)
        assert compiled.counts.tensor_core.startswith("wgmma")


def quantizers(target: int, dtype: str) -> list[launch.Kernel]:
    return quantize_activation.kernels(dtype, launch.orders_for(target).activations)


def test_quantizers_read_16_bytes_at_once() -> None:
    """A thread's loads of x; no spills; one kernel per row length, but where many tokens take fewer
    warps, and one an activation."""
    found = quantizers(90, "fp16")
    assert len(found) == 14 + 3 and len({kernel.name for kernel in found}) == 9
    for kernel in found[:6]:
        ptx = sass.compile_kernel(kernel, 90).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx


@pytest.mark.parametrize("target", [90, 120])
def test_programmatic_dependent_launch_waits_before_it_reads(target: int) -> None:
    kernel = next(k for k in quantizers(target, "bf16") if k.name == "split_halves")
    ptx = sass.compile_kernel(kernel, target).asm["ptx"]
    first = ptx.index("griddepcontrol.launch_dependents")
    assert first < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
    ptx = sass.compile_kernel(kernel, 80).asm["ptx"]
    assert "griddepcontrol" not in ptx


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_weights_are_prefetched_before_the_wait(scheme: str) -> None:
    tile = dataclasses.replace(tile_of(scheme, 90), early=1)
    kernel = ops.KERNELS[scheme].kernel(tile, "bf16", launch.orders_for(90))
    ptx = sass.compile_kernel(kernel, 90).asm["ptx"]
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.index("prefetch.global.L2") < wait < ptx.index("cp.async")
    assert "ld.global" not in ptx[:wait]


def test_a_regression_is_reported() -> None:
    compiled = compile_report.compile_tile("w4a8", 90, tile_of("w4a8", 90), m=1)
    counts = dataclasses.replace(compiled.counts, spills=30, shared=300_000, tensor_core="")
    worse = dataclasses.replace(compiled, counts=counts, issued_per_weight=1.9)
    problems = "\n".join(worse.problems())
    for word in ("spill", "issued", "shared", "tensor-core"):
        assert word in problems


def test_tiles_of_tiles_json_are_what_the_model_puts_first() -> None:
    """The counts that were committed and the model give the tiles that were committed."""
    found = tuning.read_counts(COUNTS, 80)
    table = tiles.tile_table()
    for name in ("w3a16", "w4a8"):
        for shape, rows in tuning.choose(SCHEMES[name], found, 80).items():
            kept = [(m, dataclasses.asdict(tile)) for m, tile in table["sm_80", name, shape]]
            assert kept == [(r.pop("max_m") or float("inf"), r) for r in rows]


@pytest.mark.parametrize("target", sass.TARGETS)
def test_no_bucket_is_predicted_slower_than_dequantizing_first(target: int) -> None:
    source = json.loads(tiles.TILES_FILE.read_text())[f"sm_{target}"]["source"]
    if source.startswith("measured"):
        pytest.skip("its tiles were measured, beside dequantizing first")
    found = tuning.read_counts(COUNTS, tuning.ALIKE.get(target, target))
    scheme, whole = SCHEMES["w3a16"], Tile("dequantize", block_n=0)
    for n, k in tiles.LAYER_SHAPES["Qwen2-VL-7B"].values():
        for m in tuning.BUCKETS:
            tile = tiles.select("w3a16", f"sm_{target}", n, k, m)
            time = tuning.predicted(scheme, tile, found, target, m, n, k)
            floor = tuning.predicted(scheme, whole, found, target, m, n, k)
            assert time <= floor / 0.95, (n, k, m, tile)


def test_the_model_of_time() -> None:
    """Of one program more per SM costs less than its work; a layer's step is never below memory."""
    gpu = time_model.GPUS[90]
    kernel = ops.KERNELS["w4a8"].kernel(tile_of("w4a8", 90), "bf16", launch.orders_for(90))
    counts = tuning.read_counts(COUNTS, 90)["w4a8"][tuning.compiled_as(kernel.tile)]
    work = time_model.work(kernel, 4, 1, 37888, 3584, gpu.sms)
    one, four = (time_model.step_cycles(work, counts, r, gpu) for r in (1, 4))
    assert four["chain"] == one["chain"] and four["memory"] == 4 * one["memory"]
    made = time_model.predict(work, counts, gpu)
    floor = 37888 * 3584 / 2 / gpu.bandwidth * 1e6
    assert floor < made.microseconds < 3 * floor and made.limit in one
    assert time_model.predict(work, counts, time_model.GPUS[86]).microseconds > made.microseconds
    slow = dataclasses.replace(counts, shared=200_000)
    assert time_model.predict(work, slow, time_model.GPUS[86]).microseconds == float("inf")


def test_counts_of_two_tritons_are_the_worse_of_each(tmp_path: Path) -> None:
    one = {"registers": 80, "shared": 9, "stack": 0, "spills": 0, "tensor_core": "mma",
           "issued": 120, "integer": 60}  # fmt: skip
    other = {**one, "registers": 96, "issued": 110}
    data = {
        "3.6.0": {"sm_90": {"w4a8": {"a": one, "b": one}}},
        "3.9.0": {"sm_90": {"w4a8": {"a": other}}},
    }
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(data))
    (found,) = tuning.read_counts(path, 90)["w4a8"].items()
    assert found == ("a", sass.Counts(**{**one, "registers": 96}))
    assert tuning.read_counts(path, 80) == {}
    assert set(tuning.read_counts(path, 90, "3.6.0")["w4a8"]) == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("target", sass.TARGETS)
def test_every_kernel_for_every_target(target: int) -> None:
    problems = [p for c in compile_report.report([target]) for p in c.problems()]
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize("target", sass.TARGETS)
def test_the_oldest_triton_compiles_every_kernel(target: int, oldest_triton: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qig_serve.kernels.compile_report", "--arch", str(target)],
        env={**os.environ, "PYTHONPATH": str(oldest_triton)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Triton 3.6" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.endswith("no threshold passed\n"), done.stdout[-3000:]
