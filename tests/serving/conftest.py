"""One quantized model and one server for the whole suite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny_llava
from helpers.server_process import Server, start_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model if the package has it, or else a random one; w4a8, rounded."""
    from qig_serve import demo

    folder = tmp_path_factory.mktemp("checkpoint")
    source = Path(demo.__file__).parent / "model"
    if not (source / "config.json").exists():
        source = tiny_llava.build(folder / "source")
    directory = tiny_llava.quantize(source, folder / "w4a8", "w4a8")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["calibration"] = {
        "source": "demo",
        "samples": 8,
        "sha256": "0" * 64,
        "seed": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    flags += ["--allowed-origins", '["https://page.example"]']
    started = start_server(checkpoint, tmp_path_factory.mktemp("server"), *flags)
    yield started
    if started.process.poll() is None:
        started.stop()
