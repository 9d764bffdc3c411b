"""Kernels compiled ahead: once each, side by side, in the background, and faults come out."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from qig_serve.formats import get_scheme
from qig_serve.kernels import launch, ops, tiles
from qig_serve.kernels.library import LinearJob
from qig_serve.kernels.warm_up import Compilation


def test_jobs_run_side_by_side_and_once(caplog: pytest.LogCaptureFixture) -> None:
    compilation = Compilation(threads=3)
    together = threading.Barrier(3, timeout=20)
    done: list[int] = []

    def job(i: int) -> None:
        together.wait()  # passes only if three run at once
        done.append(i)

    for i in (0, 1, 2, 0, 1):
        compilation.begin(i, lambda i=i: job(i))
    with caplog.at_level(logging.INFO):
        compilation.finish()
        compilation.finish()
    assert sorted(done) == [0, 1, 2]
    assert [r.getMessage()[:15] for r in caplog.records] == ["3 kernels ready"]


def test_more_jobs_after_the_first_have_finished() -> None:
    compilation, done = Compilation(threads=1), []
    for i in (1, 2):
        compilation.begin(i, lambda i=i: done.append(i))
        compilation.finish()
    assert done == [1, 2]


def test_what_a_job_raises_is_raised_by_finish() -> None:
    compilation = Compilation(threads=2)

    def fails() -> None:
        raise RuntimeError("no such instruction")

    compilation.begin("bad", fails)
    compilation.begin("good", lambda: None)
    with pytest.raises(RuntimeError, match="no such instruction"):
        compilation.finish()


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_linear_has_every_bucket_compiled(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, with CUDA's calls taken out: 28 layers of a kind are compiled for as one."""
    compilation, launched = Compilation(threads=2), []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(ops, "COMPILATION", compilation)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(ops, "on_device", lambda device, function, *rest: launched.append(rest))
    for _ in range(28):
        for has_bias in (False, True):
            job = LinearJob(get_scheme(scheme), 4608, 3584, torch.bfloat16, device, has_bias)
            ops.compile_ahead(job)
    compilation.finish()
    buckets = tiles.buckets(scheme, "sm_90", 4608, 3584)
    assert len(launched) == 2 * len(buckets) + 1
    linears = [rest for rest in launched if isinstance(rest[0], LinearJob)]
    assert {tile for _, tile, _ in linears} == {tile for _, tile in buckets}
    assert all(tiles.select(scheme, "sm_90", 4608, 3584, m) == tile for _, tile, m in linears)
