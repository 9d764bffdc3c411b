"""A speculator beside a quantized model: the tokens are those of the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_llava, vllm_engine

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = 48  # a random model soon repeats itself, which n-grams foresee
QUESTIONS = ("What is there?", "How many blobs are green, and where are they in the picture?")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def answers(checkpoint: Path, **options: Any) -> tuple[list[list[int]], int]:
    """Greedy tokens about two pictures at once, and how many of them a speculator foresaw."""
    from vllm import SamplingParams

    llm = vllm_engine.engine(checkpoint, dtype="float32", disable_log_stats=False, **options)
    asked = [tiny_llava.conversation(q, tiny_llava.picture(i)) for i, q in enumerate(QUESTIONS)]
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    found = llm.chat(asked, parameters, use_tqdm=False)
    counted = {metric.name: metric for metric in llm.get_metrics()}
    accepted = counted.get("vllm:spec_decode_num_accepted_tokens")
    foreseen = 0 if accepted is None else int(accepted.value)
    return [list(answer.outputs[0].token_ids) for answer in found], foreseen


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_ngrams(scheme: str, tmp_path: Path, release: None) -> None:
    source = tiny_llava.build(tmp_path / "source")
    checkpoint = tiny_llava.quantize(source, tmp_path / scheme, scheme)
    alone, _ = answers(checkpoint)
    vllm_engine.release()
    speculated, foreseen = answers(checkpoint, speculative_config=NGRAM)
    assert speculated == alone and foreseen > TOKENS / 4
