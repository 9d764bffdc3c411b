"""Tensor and pipeline parallelism on the CPU give the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llava

pytest.importorskip("vllm")

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[3])
import tiny_llava
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True,
              limit_mm_per_prompt={"image": 1, "video": 0}, **json.loads(sys.argv[2]))
    questions = ["What is there?", "How many?"]
    answers = llm.chat(
        [tiny_llava.conversation(q, tiny_llava.picture(i)) for i, q in enumerate(questions)],
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    print("TOKENS", json.dumps([list(a.outputs[0].token_ids) for a in answers]))
"""


def tokens(checkpoint: Path, program: Path, **options: int) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, program, checkpoint, json.dumps(options), Path(__file__).parent.parent],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ
        | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("TOKENS ")), None)
    assert line is not None, done.stderr[-3000:]
    result: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_two_ranks_equal_one(tmp_path: Path, scheme: str) -> None:
    source = tiny_llava.build(tmp_path / "source")
    checkpoint = tiny_llava.quantize(source, tmp_path / scheme, scheme)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    alone = tokens(checkpoint, program)
    assert tokens(checkpoint, program, tensor_parallel_size=2) == alone
    assert tokens(checkpoint, program, pipeline_parallel_size=2) == alone
