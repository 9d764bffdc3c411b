"""vLLM inside of the test's own process, on two cores that it does not have for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

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


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's configuration, as far as it is asked; tests change it."""
    # Imported with vLLM's own function, before that is replaced.
    from vllm.model_executor.layers.quantization import base_config  # noqa: F401

    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        lora_config=None,
        compilation_config=SimpleNamespace(backend="eager"),
    )
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    return config


@pytest.fixture
def no_stance() -> Iterator[None]:
    """What do_without_a_compiler may have set."""
    yield
    import torch

    torch.compiler.set_stance("default")
