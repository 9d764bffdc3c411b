"""A server of the demonstration model for the faults that are thrown at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from helpers import tiny_llava
from helpers.server_process import Server, start_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model, w4a8, rounded."""
    from qig_serve.demo import MODEL_DIR

    return tiny_llava.quantize(MODEL_DIR, tmp_path_factory.mktemp("checkpoint") / "w4a8", "w4a8")


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the requests that must not harm it."""
    folder = tmp_path_factory.mktemp("server")
    started = start_server(checkpoint, folder, "--max-num-seqs", "16", "--max-body-mb", "4")
    yield started
    if started.process.poll() is None:
        started.stop()
