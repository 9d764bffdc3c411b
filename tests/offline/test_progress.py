"""Progress: plain lines away from a terminal, nothing if quiet."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qig_serve.offline.checkpoint.writer import ResumableError
from qig_serve.offline.progress import RunProgress, host_bytes


@pytest.mark.parametrize("quiet", [False, True])
def test_plain_lines(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    with RunProgress(4, torch.device("cpu"), quiet) as progress:
        progress.block(1)
        progress.step("searching", 0.5)
        progress.block_done("output error 1e-3", first=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    if quiet:
        assert captured.err == ""
        return
    (line,) = captured.err.splitlines()
    assert line.startswith("block 2/4  output error 1e-3")
    assert "s left" in line and "GiB host" in line and "\x1b" not in line


def test_time_left_counts_from_the_first_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and the dry run are over: they say nothing about the blocks to come."""
    clock = iter([0.0, 1000.0, 1010.0, 1030.0])
    monkeypatch.setattr("qig_serve.offline.progress.time.monotonic", lambda: next(clock))
    progress = RunProgress(4, torch.device("cpu"))
    for index in (0, 1):
        progress.block(index)
        progress.block_done("done", first=0)
    first, second = capsys.readouterr().err.splitlines()
    assert "10 s, 30 s left" in first and "30 s, 30 s left" in second


def test_the_bar_is_whole_at_80_columns_and_its_clock_goes_on_behind_the_blocks() -> None:
    progress = RunProgress(80, torch.device("cpu"))
    progress.block(79)
    progress.step("equalization of gate_up", 1.0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(progress._bar.get_renderable())
    text = console.export_text()
    assert "block 80/80: equalization of gate_up" in text and "0:00:00" in text and "…" not in text
    progress.beside_blocks("writing")
    assert not progress._bar.finished


def test_the_log_is_appended_to_and_says_why_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "quantize.log"
    with pytest.raises(KeyError), RunProgress(4, torch.device("cpu"), True, log) as progress:
        progress.line("first")
        raise KeyError("why")
    with RunProgress(4, torch.device("cpu"), True, log) as progress:
        progress.block(2)
        progress.step("rounding", 0.5)
        progress.close_log()
        progress.line("to the terminal only")
    lines = log.read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        "first",
        "stopped: 'why'",
        "block 3/4: rounding",
    ]
    assert all(datetime.fromisoformat(line[:19]).year >= 2026 for line in lines)


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    progress = RunProgress(4, torch.device("cpu"), True, Path("/dev/full"))
    with pytest.raises(ResumableError, match="/dev/full cannot be written: No space left"):
        progress.line("text")


def test_memory_is_measured_in_bytes() -> None:
    assert 50e6 < host_bytes() < 64e9
