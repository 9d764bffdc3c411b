"""vLLM inside of the test's own process, on two cores that it does not have for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture
def release() -> Iterator[None]:
    """Frees the test's engine afterwards."""
    from helpers import vllm_engine

    yield
    vllm_engine.release()
