"""Two machines share the calibration samples: two torchrun launchers on loopback, over gloo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tensors_of
from helpers.processes import assert_same, fields
from helpers.server_process import START_SECONDS as SECONDS
from helpers.server_process import free_port, kill_tree

from qig_serve.errors import UserError
from qig_serve.offline import processes
from qig_serve.offline.checkpoint.writer import partial_directory
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe


class Nodes:
    """`qig-serve quantize` as two machines would run it, each with a launcher of its own."""

    def __init__(self, folder: Path, words: list[list[str]]) -> None:
        port = str(free_port())
        self.logs = [folder / f"node-{rank}.log" for rank in (0, 1)]
        self.nodes = []
        for rank, own in enumerate(words):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc-per-node", "1", "--node-rank", str(rank)]
            command += ["--master-addr", "127.0.0.1", "--master-port", port]
            with self.logs[rank].open("wb") as log:
                self.nodes.append(
                    subprocess.Popen(
                        [*command, "-m", "qig_serve", "quantize", *own],
                        stderr=log,
                        stdout=log,
                        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
                    )
                )

    def wait(self) -> list[int]:
        """Exit statuses; nothing of either is left running."""
        try:
            return [node.wait(timeout=SECONDS) for node in self.nodes]
        finally:
            for rank in (0, 1):
                self.kill(rank)

    def kill(self, rank: int) -> None:
        """The machine is gone: launcher and process at once."""
        if self.nodes[rank].poll() is None:
            kill_tree(self.nodes[rank].pid)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")


def words(model: Path, calib: str, output: Path, *more: str) -> list[str]:
    own = [str(model), "--calib", calib, "--samples", "7", "--grid", "5", "--device", "cpu"]
    return [*own, "--method", "qig", "--output", str(output), *more]


@pytest.mark.slow
def test_two_nodes_as_one_and_a_node_that_dies(
    tiny_llava: Path, seven_samples: str, tmp_path: Path
) -> None:
    """The one-node checkpoint; the other reports a lost node, and --resume ends at its bytes."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    nodes = Nodes(tmp_path, [words(tiny_llava, seven_samples, whole)] * 2)
    assert nodes.wait() == [0, 0], nodes.said(0)[-3000:] + nodes.said(1)[-3000:]
    assert nodes.said(0).count("shared by 2 processes") == 1
    assert "calibration" not in nodes.said(1)
    quantize(tiny_llava, tmp_path / "one", QuantRecipe(**fields(seven_samples)), quiet=True)
    assert_same(tmp_path / "one", whole)

    nodes = Nodes(tmp_path, [words(tiny_llava, seven_samples, part)] * 2)
    block, deadline = (
        partial_directory(part) / "block-00000.safetensors",
        time.monotonic() + SECONDS,
    )
    while not block.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    nodes.kill(1)
    status, killed = nodes.wait()
    assert status != 0 and killed == -signal.SIGKILL
    assert "another of the 2 processes has ended" in nodes.said(0)
    assert "go on with --resume" in nodes.said(0) and not part.exists()

    again = words(tiny_llava, seven_samples, part, "--resume")
    nodes = Nodes(tmp_path, [again] * 2)
    assert nodes.wait() == [0, 0], nodes.said(0)[-3000:] + nodes.said(1)[-3000:]
    assert "going on after block 1/2" in nodes.said(0)
    first, second = tensors_of(whole), tensors_of(part)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_a_node_with_other_samples_is_refused_on_both(
    tiny_llava: Path, seven_samples: str, tmp_path: Path
) -> None:
    """Each machine reads a file of its own; both say what differs."""
    copies = []
    for rank in (0, 1):
        shutil.copytree(Path(seven_samples).parent, tmp_path / str(rank))
        copies.append(tmp_path / str(rank) / Path(seven_samples).name)
    lines = copies[1].read_text().splitlines()
    copies[1].write_text("\n".join(lines[::-1]) + "\n")
    output = tmp_path / "out"
    nodes = Nodes(tmp_path, [words(tiny_llava, str(copy), output) for copy in copies])
    assert all(status != 0 for status in nodes.wait())
    for rank in (0, 1):
        assert "process 1 of 2 has another data" in nodes.said(rank), nodes.said(rank)[-3000:]
    assert not output.exists() and not partial_directory(output).exists()


def test_processes_agree_on_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = processes.Ranks(1, 2)
    first: dict[str, Any] = {"model": "a", "data": "b", "version": "1"}
    monkeypatch.setattr(processes.Ranks, "broadcast_object", lambda self, value: first)
    ranks.agree(dict(first))
    with pytest.raises(UserError, match="process 1 of 2 has another model and data than the first"):
        ranks.agree(first | {"model": "x", "data": "y"})
