"""`make gpu` as far as it goes without a GPU: its plan, where it stops, what it compiles first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_kernels_checks as checks
import gpu_kernels_figures as figures
import gpu_kernels_plan as plan
import gpu_kernels_warm as warm
import pytest
import torch
from gpu_kernels_made_up import Clock, context
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from qig_serve.kernels import launch, layout, ops, tiles, tuning


@pytest.fixture(scope="module")
def found() -> tuning.Found:
    """The compiler's figures of Triton 3.6 for sm_90, as a GPU machine has them."""
    return tuning.read_counts(warm.COUNTS, 90, "3.6.0")


# ---- the plan


def test_the_plan_fills_six_minutes_and_prints_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(stage.limit for stage in plan.STAGES) <= plan.SECONDS
    assert all(stage.usual < stage.limit for stage in plan.STAGES)
    assert gpu_kernels.main(["--plan"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:-1]] == [
        stage.name for stage in plan.STAGES
    ]
    assert printed.splitlines()[-1] == "ends after 360 s"
    with pytest.raises(SystemExit):
        gpu_kernels.main(["--plan", "--stages", "warm,nonsense"])
    assert "no such stage: nonsense" in capsys.readouterr().err


def run_plan(seconds: float, takes: dict[str, float]) -> dict[str, plan.Outcome]:
    """The stages with a clock of our own; a stage "fails" where it takes a negative time."""
    clock, noted = Clock(), {}

    def run(name: str, limit: float) -> plan.Outcome:
        wanted = abs(takes.get(name, 10.0))
        clock.now += min(wanted, limit)
        if wanted > limit:
            return plan.Outcome("stopped", limit, "its time was up")
        return plan.Outcome("failed" if takes.get(name, 0) < 0 else "done", wanted)

    outcomes = plan.run_stages(plan.STAGES, seconds, run, noted.__setitem__, clock)
    assert noted == outcomes and clock.now <= seconds
    return outcomes


def test_a_stage_costs_only_itself() -> None:
    outcomes = run_plan(360, {"warm": -5.0, "tune": 1e9})
    assert {name: o.status for name, o in outcomes.items()} == {
        "warm": "failed", "tests": "done", "tune": "stopped", "time": "done", "rivals": "done",
        "counters": "done",
    }  # fmt: skip


def test_what_would_not_end_is_not_begun() -> None:
    outcomes = run_plan(150, dict.fromkeys(["warm", "tests", "tune"], 1e9))
    assert outcomes["warm"].seconds == 60 and outcomes["tests"].seconds == 80
    assert outcomes["tune"].status == outcomes["time"].status == "not begun"
    assert outcomes["tune"].reason == "10 s were left, and it usually takes 50 s"
    # A stage that is shorter than what is left may still run, for less than its limit.
    assert run_plan(75, {"warm": 60.0, "time": 14.0})["time"].seconds == 14


def test_results_are_whole_at_any_moment(tmp_path: Path) -> None:
    results = plan.Results(tmp_path / "deep" / "results.json")
    results.write("one", [1])
    results.write("two", {"a": 2})
    results.write("one", [3])
    assert results.read() == {"one": [3], "two": {"a": 2}}
    assert [path.name for path in results.path.parent.iterdir()] == ["results.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_kernels.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "the kernels are measured on a GPU, and no CUDA device was found\n"
    assert not printed.out and not list(tmp_path.iterdir())


def test_there_is_no_plot_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    plan.write_json(path, {"machine": {}})
    assert gpu_kernels.main(["--plot", str(path)]) == 1
    assert capsys.readouterr().err == "no plot: no layer has all its times\n"


def test_stages_are_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives its reason, and one whose time is up at once."""
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "results.json"
    if not list(Path("/usr/local").glob("cuda*/bin/ncu")):
        failed = gpu_kernels.start_stage("counters", 60, path, tmp_path)
        assert failed.status == "failed"
        assert failed.reason == "Nsight Compute (ncu) is not installed"
    stopped = gpu_kernels.start_stage("counters", 0.01, path, tmp_path)
    assert stopped.status == "stopped" and stopped.reason == "its 0 s were up"


def test_names_of_files() -> None:
    assert plan.slug("NVIDIA H200") == "H200"
    assert plan.slug("NVIDIA H100 80GB HBM3") == "H100-80GB-HBM3"


# ---- warm


@pytest.mark.parametrize("size", [*warm.shapes(), warm.HEAD, (2560, 1152), (130, 384)])
def test_small_weights_are_compiled_as_real_ones(size: tuple[int, int]) -> None:
    small = warm.smallest_like(*size)
    assert warm.specialization(*small) == warm.specialization(*size)
    assert small[0] * small[1] <= 2048 * 384


def triton_key(kernel: launch.Kernel, n: int, k: int) -> Any:
    """What Triton distinguishes launches of a kernel by, for a weight [N, K] on sm_90."""
    function = kernel.function
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(function.signature, function.params, backend)
    rows = layout.padded_rows(n)
    numbers = {"N": n, "K": k, "N_PAD": rows, "TILES": rows // layout.ROW_TILE}
    kinds = {"*i8": torch.int8, "*i32": torch.int32, "*i64": torch.int64, "*fp32": torch.float32}
    values: dict[str, Any] = {"PDL": True, **kernel.constants}
    for name, kind in kernel.arguments.items():
        if kind.startswith("*"):
            values[name] = torch.zeros(16, dtype=kinds.get(kind, torch.bfloat16))
        else:
            values[name] = numbers.get(name, n // 7)  # any: it does not count
    return binder(*(values[name] for name in function.arg_names), debug=False, **kernel.options)[1]


@pytest.mark.parametrize("size", warm.shapes())
def test_triton_takes_small_weights_for_real_ones(size: tuple[int, int]) -> None:
    """By Triton's own rule of what is compiled apart."""
    small = warm.smallest_like(*size)
    for scheme in figures.SCHEMES:
        kinds = {t.regime: t for m in tuning.BUCKETS for t in tuning.candidates(scheme, m)}
        for tile in kinds.values():
            kernel = ops.KERNELS[scheme].kernel(tile, "bf16", launch.orders_of((9, 0)))
            assert triton_key(kernel, *small) == triton_key(kernel, *size), kernel.name
            assert triton_key(kernel, *small) != triton_key(kernel, size[0] + 1, size[1])


def test_everything_that_is_timed_is_warmed(found: tuning.Found) -> None:
    jobs = warm.jobs(90, found)
    assert len(jobs) < 350
    made = {(j.kind, tuning.compiled_as(j.tile), warm.specialization(j.n, j.k))
            for j in jobs if j.tile and j.tile.regime != "dequantize"}  # fmt: skip
    for n, k in warm.shapes():
        for scheme in figures.SCHEMES:
            for m in figures.TOKENS:
                tile = tiles.select(scheme, "sm_90", n, k, m)
                if tile.regime != "dequantize":
                    assert (scheme, tuning.compiled_as(tile), warm.specialization(n, k)) in made
    assert {j.k for j in jobs if j.kind == "quantizers"} == {k for _, k in warm.shapes()}
    assert sum(j.kind == "head" for j in jobs) == len(warm.HEAD_TILES)
    areas = [j.tile.block_m * j.tile.block_n for j in jobs if j.tile]
    assert areas == sorted(areas, reverse=True), "what takes long begins first"


def test_the_pool_names_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for want of a GPU; one job too many for the time is named as well."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which nothing fails")
    jobs = [warm.Job("quantizers", 0, k) for k in (128, 256)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(warm, "jobs", lambda *_: jobs)
    at = context(tmp_path, Clock(), 60.0)
    with pytest.raises(plan.Failed, match="2 kernels do not compile: quantizers"):
        warm.run(at)
    found = at.results.read()["warm"]
    assert found["kernels"] == 2 and found["compiled"] == 0
    assert set(found["failed"]) == {"quantizers 128", "quantizers 256"}
    with pytest.raises(plan.Failed, match="2 of 2 kernels were not compiled in time"):
        warm.run(context(tmp_path, Clock(), 0.0))


# ---- tests


def test_gpu_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c[1]"><failure message="assert 1 == 2&#10;more">text</failure></testcase>'
        "</testsuite></testsuites>"
    )
    assert checks.counts(report) == {
        "passed": 1, "failed": 1, "skipped": 1, "failures": {"c[1]": "assert 1 == 2"}
    }  # fmt: skip
    assert checks.command(report)[-1] == checks.TESTS and (plan.ROOT / checks.TESTS).exists()
