"""The quantizer killed, out of disk, told to stop, started twice: what is left, and what is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import quantizer_runs as runs
import torch
from safetensors.torch import save_file

from qig_serve.offline.checkpoint import CheckpointWriter
from qig_serve.offline.source_checkpoint import SourceCheckpoint

CONFIG = {
    "quant_method": "qig",
    "format_version": 1,
    "scheme": "w3a16",
    "bits": 3,
    "group_size": 128,
    "ignore": ["head"],
}


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    """A directory that the checkpoint writer can work on, without a model behind it."""
    directory = tmp_path / "source"
    (directory / "templates").mkdir(parents=True)
    save_file({f"{n}.weight": torch.ones(4, 8) for n in "abc"}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llava"}')
    (directory / "tokenizer.json").write_text("{}" * 5000)
    (directory / "templates" / "tool.jinja").write_text("tool" * 100)
    return directory


def write(source: Path, output: Path, resume: bool = False) -> None:
    """Two blocks, a report, and the rest, through the checkpoint writer."""
    with CheckpointWriter(SourceCheckpoint(source), output, {"seed": 0}, resume) as writer:
        for index in range(writer.finished, 2):
            packed = torch.full((4, 3), index, dtype=torch.int32)
            writer.write_block(
                index, {f"{'ab'[index]}.weight_packed": packed}, [f"{'ab'[index]}.weight"]
            )
            writer.write_text("report.json", "{}")
        writer.publish(CONFIG)


def finish(run: Callable[[bool], None], output: Path) -> bool:
    """Brings a killed run to its end, as its user would; whether anything was left to go on from."""
    if output.exists():
        assert not runs.partial_of(output).exists()
        return True
    resume = runs.partial_of(output).exists()
    assert runs.forked(lambda: run(resume)) == 0
    return resume


def test_killed_before_every_change_on_disk(small_source: Path, tmp_path: Path) -> None:
    """Files are opened, renamed and removed some fifty times in a run; it is killed at each."""
    whole = tmp_path / "whole"
    write(small_source, whole)
    wanted = runs.tree(whole)
    number, status = 0, -9
    while status != 0:
        number += 1
        output = tmp_path / f"killed-{number}"

        def killed(output: Path = output, number: int = number) -> None:
            runs.die_at(output.parent, number)
            write(small_source, output)

        status = runs.forked(killed)
        assert status in (0, -9)
        assert not output.exists() or runs.tree(output) == wanted
        finish(lambda resume, output=output: write(small_source, output, resume), output)
        assert runs.tree(output) == wanted, f"killed before change {number}"
        assert runs.vouched(output)
        assert not list(tmp_path.glob(".*"))
    assert number > 30
