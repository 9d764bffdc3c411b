"""Qwen3.5's multi-token head beside a quantized decoder: kept, ignored, and used to speculate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import one_sample, tiny_model

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SPECULATORS: dict[str, dict[str, Any]] = {
    "mtp": {"method": "mtp", "num_speculative_tokens": 1},
    "ngram": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
}


def _tokens(directory: Path, speculator: dict[str, Any] | None) -> list[int]:
    import gc

    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(directory),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=2,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        speculative_config=speculator,
        seed=0,
    )
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    messages: Any = [{"role": "user", "content": "What color is the star?"}]
    (answer,) = llm.chat([messages], parameters, use_tqdm=False)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return list(answer.outputs[0].token_ids)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    folder = tmp_path_factory.mktemp("mtp")
    calib = one_sample(folder)
    recipe = make_recipe({"scheme": "w3a16", "method": "rtn", "calib": calib, "samples": 1})
    quantize(tiny_model("qwen3_5", folder / "source"), folder / "w3a16", recipe, quiet=True)
    return folder / "w3a16"


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[int]:
    return _tokens(checkpoint, None)


@pytest.mark.parametrize("speculator", SPECULATORS)
def test_speculation_changes_no_token(speculator: str, checkpoint: Path, plain: list[int]) -> None:
    ignored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["ignore"]
    assert "mtp" in ignored
    assert _tokens(checkpoint, SPECULATORS[speculator]) == plain
