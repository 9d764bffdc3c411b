"""vLLM inside of a test's own process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any


def engine(checkpoint: Path, **options: Any) -> Any:
    """vLLM's own LLM, with nothing said about quantization; options: of vLLM, beside these."""
    from vllm import LLM

    settings = {
        "max_model_len": 512,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "seed": 0,
    }
    return LLM(str(checkpoint), **(settings | options))


def release() -> None:
    """Frees an engine of this process, one that did not start included."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
