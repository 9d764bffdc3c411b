"""The stages of `make gpu` that measure, with times that are made up: files, figures, deadlines.

They say nothing about the kernels.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fit_time_model
import gpu_kernels_figures as figures
import gpu_kernels_plan as plan
import gpu_kernels_rivals as rivals
import gpu_kernels_time as stage_time
import gpu_kernels_tune as tune
import gpu_kernels_warm as warm
import pytest
import torch
from gpu_kernels_made_up import ABOUT, LIMITS, Clock, MadeUp, context

from qig_serve.formats import SCHEMES
from qig_serve.kernels import tiles, time_model, tuning
from qig_serve.kernels.tiles import Tile


@pytest.fixture(scope="module")
def found() -> tuning.Found:
    """The compiler's figures of Triton 3.6 for sm_90, as a GPU machine has them."""
    return tuning.read_counts(warm.COUNTS, 90, "3.6.0")


# ---- tune


def tuned(found: tuning.Found, seconds: float, second: float) -> tuple[list[tune.Row], int]:
    clock, kept = Clock(), []
    left: Callable[[], float] = lambda: seconds - clock.now  # noqa: E731
    bench = MadeUp(found, clock, second)
    rows = tune.measure(bench, 90, 132, found, left, lambda r: kept.append(len(r)), {})
    assert kept[-1] == len(rows) and clock.now <= seconds
    return rows, len(kept)


def test_tuning_writes_rows_that_the_model_is_fitted_to(
    found: tuning.Found, tmp_path: Path
) -> None:
    rows, saved = tuned(found, 1e6, 0.0)
    assert saved == len(warm.shapes())
    gpu = {"bandwidth": 3e12, "sms": 132}
    path = tmp_path / "kernel-times.json"
    plan.write_json(path, tune.times_file(rows, ABOUT, found, gpu))
    old = json.loads(fit_time_model.ROWS.read_text())
    new = json.loads(path.read_text())
    assert set(old) - {"cublas_us", "served_us"} <= set(new)
    assert set(old["rows"][0]) <= set(new["rows"][0])
    read = fit_time_model.read([fit_time_model.ROWS, path])
    assert len(read) == len(old["rows"]) + len(new["rows"]) > 142
    mine = [r for r in read if r["shape"][2] == path.name]
    slower = [fit_time_model.predicted(r, time_model.FIT) / r["us"] for r in mine]
    assert min(slower) > 0.9 and max(slower) < 4.28e12 / 3e12 + 0.1, "other bandwidth, same model"
    assert tune.summary(rows)["median_error_of_model"] == 0
    assert tune.summary(rows)["cost_of_its_first_choice"] == 0


def test_the_fastest_tiles_are_chosen(found: tuning.Found) -> None:
    rows, _ = tuned(found, 1e6, 0.0)
    slow = next(r for r in rows if r["scheme"] == "w4a8" and r["m"] == 16)
    where = ("scheme", "m", "n", "k")
    same = [r for r in rows if [r[w] for w in where] == [slow[w] for w in where]]
    best = min((r for r in same if r is not slow), key=lambda r: r["us"])
    slow["us"] = 1e6
    entry = tune.entry(rows, "sm_90", "made up")
    assert entry["source"] == "made up" and set(entry) == {"source", "w3a16", "w4a8"}
    by_bound = entry["w4a8"][f"{slow['n']}x{slow['k']}"]
    chosen = next(t for t in by_bound if t["max_m"] is None or t["max_m"] >= 16)
    assert {k: v for k, v in chosen.items() if k != "max_m"} == best["tile"]
    for scheme in ("w3a16", "w4a8"):
        assert set(entry[scheme]) >= {"default", *(f"{n}x{k}" for n, k in warm.shapes())}
        for buckets in entry[scheme].values():
            bounds = [float("inf") if t["max_m"] is None else t["max_m"] for t in buckets]
            assert bounds == sorted(set(bounds)) and bounds[-1] == float("inf")
            for t in buckets:
                Tile(**{k: v for k, v in t.items() if k != "max_m"})


def test_without_the_compilers_figures_the_present_tiles_are_timed(
    found: tuning.Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an architecture that nobody compiled the candidates for."""
    monkeypatch.setattr(warm, "EVERY", ())
    monkeypatch.setattr(tune, "ELSEWHERE", 0)
    bench, failed = MadeUp(found, Clock()), dict[str, str]()
    bench.gemm = lambda *_: 1.0  # type: ignore[method-assign]
    rows = tune.measure(bench, 90, 132, {}, lambda: 1e6, lambda r: None, failed)
    assert not failed
    for m in tuning.BUCKETS:  # and cuBLAS's way, where it is tried
        through = any(t.regime == "dequantize" for t in tuning.candidates("w3a16", m))
        for n, k in warm.shapes():
            here = [r for r in rows if (r["m"], r["n"], r["k"]) == (m, n, k)]
            assert 2 <= len(here) <= 2 + 3 * through
            assert through == any(r["tile"]["regime"] == "dequantize" for r in here)
    assert all(r["predicted"] is None for r in rows)
    assert tune.summary(rows)["median_error_of_model"] is None
    assert not tune.times_file(rows, ABOUT, {}, {})["rows"]


def test_tuning_stops_when_its_time_is_up(found: tuning.Found) -> None:
    rows, _ = tuned(found, 60.0, 1.0)
    assert 50 <= len(rows) <= 60
    entry = tune.entry(rows, "sm_90", "made up")
    present = tiles.tile_table()
    for scheme in ("w3a16", "w4a8"):  # what was not timed stays
        for of, by, shape in present:
            assert (of, by) != ("sm_90", scheme) or shape in entry[scheme]


# ---- time


def test_the_headline(found: tuning.Found, tmp_path: Path) -> None:
    clock = Clock()
    at = context(tmp_path, clock)
    result = stage_time.measure(MadeUp(found, clock), at)
    assert at.results.read()["time"] == json.loads(json.dumps(result))
    assert list(result["models"]) == list(tiles.LAYER_SHAPES)
    for entry in result["models"].values():
        assert [e["m"] for e in entry["sums"]] == list(figures.TOKENS)
        first = entry["sums"][0]
        assert first["w3a16"]["ratio"] == pytest.approx(2) and not first["w3a16"]["met"]
        assert entry["sums"][9]["w4a8"]["met"]  # 2x at 512, where 1.5 is wanted
        rows = [r for r in entry["rows"] if r["m"] == 1]
        assert first["cublas"] == pytest.approx(sum(r["cublas"] for r in rows))
        # o is quantized alone, the other three cost the half microsecond that fusing adds
        extra = first["w4a8"]["fused_us"] - first["w4a8"]["gemm_us"]
        assert extra == pytest.approx(2.0 + 3 * 0.5)
        assert "relative_error" in rows[0]["w4a8"]
    assert [r["m"] for r in result["head"]] == list(stage_time.HEAD_TOKENS)
    assert result["head"][0]["us"] == 108.0 and result["head"][0]["tile"].startswith("halves 8x128")
    table = figures.table("Qwen2-VL-7B", result["models"]["Qwen2-VL-7B"]["sums"])
    assert table.splitlines()[4].startswith("| 1 | ") and "(2.00x; 3.6x **below**" in table
    png = tmp_path / "kernels.png"
    assert figures.plot({"machine": ABOUT, "time": result}, png)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert not figures.plot({"machine": ABOUT}, png), "nothing to draw"


def test_a_row_that_fails_costs_itself(found: tuning.Found, tmp_path: Path) -> None:
    class Breaking(MadeUp):
        def linear(self, scheme: str, m: int) -> float:
            if m == 128 and self.shape == (4608, 3584):
                raise RuntimeError("made up")
            return super().linear(scheme, m)

        def gemm(self, scheme: str, m: int, tile: Tile) -> float | None:
            if tile.regime == "stream_k":
                raise RuntimeError("made up")
            return super().gemm(scheme, m, tile) if tile.block_m > 8 else None

    clock, failed = Clock(), dict[str, str]()
    bench = Breaking(found, clock)
    rows = tune.measure(bench, 90, 132, found, lambda: 1e6, lambda r: None, failed)
    assert rows and set(failed.values()) == {"RuntimeError: made up", "the device cannot run it"}
    bench.gemm = lambda *_: 1.0  # type: ignore[method-assign]
    entry = stage_time.measure(bench, context(tmp_path, clock))["models"]["Qwen2-VL-7B"]
    assert entry["failed"] == {"qkv M=128": "RuntimeError: made up"}
    assert [e["m"] for e in entry["sums"]] == [m for m in figures.TOKENS if m != 128]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the stages take")
def test_what_is_launched_runs_in_the_interpreter() -> None:
    program = Path(__file__).with_name("gpu_kernels_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-P", str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["row"]["w3a16"]["relative_error"] < 4e-3
    assert found["row"]["w4a8"]["relative_error"] < 2e-2  # activations in 8 bits
    assert found["errors"]["cublas_bf16"] < 4e-3 < found["errors"]["w4a8"] < 0.2
    assert found["errors"]["w3a16"] < 0.3 and found["head"] == 1.0


def test_timing_stops_when_its_time_is_up(found: tuning.Found, tmp_path: Path) -> None:
    clock = Clock()
    at = context(tmp_path, clock, 400.0)
    result = stage_time.measure(MadeUp(found, clock, 1.0), at)
    assert clock.now <= 400.0 + 8  # a row more
    models = list(result["models"].values())
    assert models[0]["sums"] and not models[-1]["sums"], "a layer that is not whole has no sum"


@pytest.mark.parametrize(
    ("scheme", "m", "microseconds"),
    [
        # gate_up of Qwen2-VL-7B: 135.8 M weights, by hand
        ("w3a16", 1, (37888 * 3584 * 3.25 / 8 + 2 * (3584 + 37888)) / 4e12 * 1e6),
        ("w4a8", 8192, 2 * 8192 * 37888 * 3584 / 16e14 * 1e6),
    ],
)
def test_the_limit_is_the_larger_of_bytes_and_operations(
    scheme: str, m: int, microseconds: float
) -> None:
    assert figures.floor(scheme, m, 37888, 3584, LIMITS) == pytest.approx(microseconds)
    assert figures.BITS[scheme] == tuning.stored_bits(SCHEMES[scheme])


def test_goals_cover_every_number_of_tokens() -> None:
    assert figures.goal("w3a16", 1) == 3.6 and figures.goal("w3a16", 9) == 3.2
    assert figures.goal("w4a8", 8192) == 1.55
    for scheme in figures.SCHEMES:
        assert all(figures.goal(scheme, m) > 0.9 for m in figures.TOKENS)


def test_what_fusing_costs() -> None:
    parts = {"hidden": {"split_halves": 2.0, "rms_norm_halves": 1.0, "rms_norm": 3.0}}
    assert figures.fused_cost("w3a16", "o", "halves", parts) == 2.0
    assert figures.fused_cost("w3a16", "qkv", "halves", parts) == 0.0, "never a gain"
    assert figures.fused_cost("w3a16", "o", "stream_k", parts) == 0.0


# ---- rivals


def test_rivals_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves: list[list[str]] = []

    def in_processes(names: list[str], *_: object) -> dict[str, Any]:
        waves.append(names)
        row = {"m": 1, "us": 20.0, "relative_error": 0.05}
        ran = {"rows": [row, {"m": 16, "unavailable": "RuntimeError: made up"}]}
        return {n: {"unavailable": "stopped"} if n == "w4a8" else ran for n in names}

    there = {"torch": object(), "vllm": object(), "gemlite": object()}
    monkeypatch.setattr(rivals.importlib.util, "find_spec", there.get)
    monkeypatch.setattr(rivals, "in_processes", in_processes)
    monkeypatch.setenv("OTHER_HUMMING", str(tmp_path))
    at = context(tmp_path, Clock())
    rivals.run(at)
    result = at.results.read()["rivals"]
    assert set(result) >= {*rivals.RIVALS, *rivals.OTHER}
    assert waves[1:] == [["gemlite_w4a8"]]
    assert sorted(waves[0] + waves[1]) == sorted(
        name for name, (module, _) in rivals.RIVALS.items() if module in there
    )
    assert result["humming_w3a16"]["unavailable"] == "humming is not installed"
    assert "no folder" in result["humming_w4a8_other"]["unavailable"]
    line = rivals.in_short(result["cublas_bf16"])
    assert line == "M=1 20.0 us (5.0e-02); M=16 RuntimeError: made up"
    (tmp_path / "humming").mkdir()
    assert not rivals.present("humming_w3a16_other", str(tmp_path))


def test_no_rival_at_all_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "in_processes", lambda names, *_: {n: {} for n in names})
    at = context(tmp_path, Clock())
    with pytest.raises(plan.Failed, match="no rival could be timed"):
        rivals.run(at)
    with pytest.raises(plan.Failed):
        rivals.run(context(tmp_path, Clock(), 3.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they run")
def test_a_rival_that_breaks_or_hangs_costs_itself(tmp_path: Path) -> None:
    entries = rivals.in_processes(["cublas_bf16", "w3a16"], 120.0, tmp_path, "")
    assert all(entry["unavailable"] and "rows" not in entry for entry in entries.values())
    entry = rivals.in_processes(["cublas_bf16"], 0.01, tmp_path, "")["cublas_bf16"]
    assert entry["unavailable"] == "stopped after 0 s"


def test_a_rival_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls are built under the shared lock and timed under the exclusive one."""
    held: list[int] = []
    path = tmp_path / "rows.json"

    def build(name: str, path: Path, found: dict[str, Any]) -> dict[int, Any]:
        found["rows"] += [{"m": 1}, {"m": 16, "unavailable": "made up"}]
        with (tmp_path / rivals.LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return {1: lambda: None}

    def timed(*_: object) -> tuple[float, str]:
        with (tmp_path / rivals.LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        held.append(1)
        return 5.0, "graph"

    monkeypatch.setattr(rivals, "_build", build)
    monkeypatch.setattr(rivals, "cold_microseconds", timed)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    rivals.measure_one("cublas_bf16", path)
    signal.alarm(0)
    rows = json.loads(path.read_text())["rows"]
    assert held == [1] and rows[0]["us"] == 5.0 and "us" not in rows[1]


def test_rows_know_their_launch(found: tuning.Found) -> None:
    tile = tiles.select("w3a16", "sm_90", 3584, 3584, 1)
    row = tune.row("w3a16", tile, 90, 1, 3584, 3584, 9.0, None, 132, True)
    assert row["layer"] == "o" and Tile(**row["tile"]) == tile
    assert {f.name for f in dataclasses.fields(time_model.Work)} == set(row["work"])
    assert row["kernel"].removeprefix("w3a16 ") in found["w3a16"]
