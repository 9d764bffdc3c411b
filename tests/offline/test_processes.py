"""Several processes share the calibration samples: the same result, one sentence for errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tensors_of
from helpers.processes import assert_same, fields, in_two_processes, run_cases

from qig_serve.errors import UserError
from qig_serve.offline.pipeline import LOG_FILE, quantize
from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.recipe import QuantRecipe

CASE = {"scheme": "w4a8", "method": "qig+", "grid": 3, "offload": "disk"}
CASES = {
    "w3a16-qig": {"method": "qig"},
    "w4a8-qig": {"scheme": "w4a8", "method": "qig"},
    "w3a16-qig+": {"method": "qig+"},
    "w4a8-qig+": {"scheme": "w4a8", "method": "qig+"},
    **{f"w3a16-{m}": {"method": m} for m in ("rtn", "awq", "awq-clip", "mbq", "gptq", "gptq-qig")},
    "w4a8-smoothquant": {"scheme": "w4a8", "method": "smoothquant"},
    "w3a16-gradient": {"method": "qig", "token_weights": "gradient", "allow_fallbacks": True},
    "w3a16-attention": {"method": "qig", "token_weights": "attention"},
    "w3a16-perturbation": {"method": "qig", "token_weights": "perturbation"},
}


def check_case(model: Path, calib: str, out: Path, case: dict[str, Any]) -> None:
    in_two_processes(model, out, {"two": fields(calib, **case)})
    quantize(model, out / "one", QuantRecipe(**fields(calib, **case)), quiet=True)
    assert_same(out / "one", out / "two")
    log = (out / "two" / LOG_FILE).read_text()
    assert "shared by 2 processes" in log and log.count("all blocks done") == 1
    assert {p.name for p in out.iterdir()} == {"one", "two"}


def test_two_processes_as_one(tiny_llava: Path, seven_samples: str, tmp_path: Path) -> None:
    check_case(tiny_llava, seven_samples, tmp_path, CASE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_two_processes_every_method(
    tiny_llava: Path, seven_samples: str, tmp_path: Path, case: dict[str, Any]
) -> None:
    check_case(tiny_llava, seven_samples, tmp_path, case)


def test_what_fails_in_one_fails_in_all(
    tiny_llava: Path, seven_samples: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    calib = seven_samples
    cases = {
        "too-few": fields(calib, samples=1),
        "too-long": fields(calib, max_length=5),
        "there": fields(calib),  # found by the first process alone
    }
    in_two_processes(tiny_llava, tmp_path, cases)
    for name, sentence in {
        "too-few": "2 processes for 1 calibration samples",
        "too-long": "more than 5",
        "there": "exists already",
    }.items():
        for rank in (0, 1):
            assert sentence in (tmp_path / f"{name}.{rank}.txt").read_text()
    assert "PeerInputError" in (tmp_path / "there.1.txt").read_text()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [*command, "-m", "qig_serve", "quantize", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )


@pytest.mark.slow
def test_torchrun(tiny_llava: Path, seven_samples: str, tmp_path: Path) -> None:
    """As people start it: one process prints, a mistake is one line and status 2."""
    words = [str(tiny_llava), "--calib", seven_samples, "--samples", "7", "--grid", "5"]
    words += ["--device", "cpu", "--method", "qig"]
    done = torchrun(*words, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("estimate: about") == 1
    assert done.stderr.count("shared by 2 processes") == 1
    quantize(tiny_llava, tmp_path / "one", QuantRecipe(**fields(seven_samples)), quiet=True)
    assert_same(tmp_path / "one", tmp_path / "out")
    again = torchrun(*words, "--output", str(tmp_path / "out"))
    assert again.returncode != 0 and "exitcode  : 2" in again.stderr
    printed = [
        line for line in again.stderr.splitlines() if line.startswith("qig-serve quantize: ")
    ]
    assert len(printed) == 1 and "exists already" in printed[0]
    assert {p.name for p in tmp_path.iterdir()} == {"out", "one"}


@pytest.mark.slow
def test_a_killed_process_ends_the_other(
    tiny_llava: Path, seven_samples: str, tmp_path: Path
) -> None:
    """The first one keeps its blocks, and the same two processes go on to the same bytes."""
    from qig_serve.offline import pipeline

    recipe = fields(seven_samples)
    in_two_processes(tiny_llava, tmp_path, {"whole": recipe})
    original = pipeline.round_block
    context = multiprocessing.get_context("fork")

    def dying(rank: int) -> None:
        calls: list[int] = []

        def round_block(*args: Any) -> Any:
            calls.append(1)
            if rank == 1 and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        pipeline.round_block = round_block
        run_cases(rank, tmp_path.parent / "meeting", tiny_llava, tmp_path, {"part": recipe})

    processes = [context.Process(target=dying, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert processes[1].exitcode == -signal.SIGKILL
    assert "PeerLostError: another of the 2 processes" in (tmp_path / "part.0.txt").read_text()
    with pytest.raises(UserError, match="processes was 2 and is 1"):
        quantize(tiny_llava, tmp_path / "part", QuantRecipe(**recipe), resume=True, quiet=True)
    in_two_processes(tiny_llava, tmp_path, {"part": recipe}, resume=True)
    whole, part = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "part")
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())


def test_samples_are_dealt_out() -> None:
    parts = [Ranks(rank, 3).shard(list(range(8))) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_one_process_exchanges_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    ALONE.sum(tensor)
    ALONE.maximum(tensor)
    ALONE.broadcast(tensor)
    assert (
        tensor.tolist() == [1, 2]
        and ALONE.total(1, 2) == [1, 2]
        and ALONE.broadcast_object("x") == "x"
    )
    ALONE.barrier(ValueError())
    assert ALONE.writes
