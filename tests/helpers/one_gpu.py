"""Compiles and loads one_gpu.cpp, as a plugin of pytest (`-p`) before anything imports torch.

Needs g++; ONE_GPU names the library, which is made if it is not there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    load()


def load() -> None:
    """For the whole process, once: torch asks for its hooks only the first time."""
    library = Path(os.environ.get("ONE_GPU") or f"{tempfile.gettempdir()}/qig_one_gpu.so")
    spec = importlib.util.find_spec("torch")  # its folder, without importing it
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    if not library.is_file():
        include = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
        link = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
        source = Path(__file__).with_suffix(".cpp")
        build = ["g++", "-std=c++20", "-shared", "-fPIC", *include, str(source), *link]
        subprocess.run([*build, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))

    import torch

    # Of all the process, before anything decorates with it: no wrapped tensor can be in it.
    torch.inference_mode = torch.no_grad
