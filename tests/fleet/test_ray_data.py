"""docker/ray/batch.py on CPUs: two engines answer a batch as `qig-serve generate` does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fleet import NO_RAY, RAY_SCRIPTS, ray_environment
from helpers.server_process import START_SECONDS, kill_tree

pytest.importorskip("ray", reason=NO_RAY)
pytestmark = pytest.mark.slow

OPTIONS = ["--engines", "2", "--device", "cpu", "--cpus", "8"]
OPTIONS += ["--max-model-len", "512", "--batch-size", "4"]


def start(checkpoint: Path, batch: Path, output: Path) -> subprocess.Popen[bytes]:
    """The script; what it says is beside the output."""
    words = [RAY_SCRIPTS / "batch.py", checkpoint, batch, output]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, words), *OPTIONS],
            env=ray_environment(),
            stdout=log,
            stderr=log,
        )


def run(checkpoint: Path, batch: Path, output: Path) -> None:
    """The script, to a good end."""
    process = start(checkpoint, batch, output)
    try:
        assert process.wait(timeout=2 * START_SECONDS) == 0, said(output)
    finally:
        kill_tree(process.pid)


def said(output: Path) -> str:
    """The end of what the script said."""
    return output.with_suffix(".log").read_text(errors="replace")[-9000:]


def rows_of(output: Path) -> list[dict[str, str]]:
    """All that was written."""
    lines = [line for path in output.glob("*.json") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def answers_of(output: Path) -> dict[str, str]:
    """By custom_id."""
    return {row["custom_id"]: row["answer"] for row in rows_of(output) if not row["error"]}


def test_a_batch_is_answered_as_generate_does_and_goes_on(
    checkpoint: Path, batch: Path, generated: dict[str, str], tmp_path: Path
) -> None:
    """The same custom_ids and answers; what an earlier run has answered is not asked again."""
    kept = sorted(generated)[:3]
    output = tmp_path / "out"
    output.mkdir()
    with (output / "earlier.json").open("w") as file:
        for name in kept:
            row = {"custom_id": name, "answer": "of an earlier run", "error": ""}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"custom_id": "failed", "answer": "", "error": "why"}) + "\n")
    run(checkpoint, batch, output)
    assert len(rows_of(output)) == len(generated) + 1
    assert answers_of(output) == generated | dict.fromkeys(kept, "of an earlier run")


def test_a_killed_engine(
    checkpoint: Path, batch: Path, generated: dict[str, str], tmp_path: Path
) -> None:
    """kill -9 to one of two in the middle: after at most one more run all answers are there."""
    psutil = pytest.importorskip("psutil")
    output, many, expected = tmp_path / "out", batch.with_name("many.jsonl"), {}
    output.mkdir()
    with many.open("w") as file:
        for i in range(12):
            for line in map(json.loads, batch.read_text().splitlines()):
                name = f"{line['custom_id']}-{i}"
                expected[name] = generated[line["custom_id"]]
                file.write(json.dumps(line | {"custom_id": name}) + "\n")
    process = start(checkpoint, many, output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers_of(output):
            assert process.poll() is None and time.monotonic() < deadline, said(output)
            time.sleep(0.1)
        below = psutil.Process(process.pid).children(recursive=True)
        engines = [p.pid for p in below if "vLLMEngineStage" in "".join(p.cmdline())]
        kill_tree(engines[0])
        status = process.wait(timeout=2 * START_SECONDS)
    finally:
        kill_tree(process.pid)
    there = len(answers_of(output))
    print(f"\none of {len(engines)} killed: status {status}, {there} of {len(expected)} answered")
    if status:
        run(checkpoint, many, output)
    assert answers_of(output) == expected
