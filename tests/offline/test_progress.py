"""Progress: plain lines away from a terminal, nothing if quiet."""

from __future__ import annotations

import pytest
import torch

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


def test_memory_is_measured_in_bytes() -> None:
    assert 50e6 < host_bytes() < 64e9
