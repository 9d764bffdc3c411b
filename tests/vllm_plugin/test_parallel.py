"""Tensor, pipeline, data and expert parallelism on the CPU give the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_llava
from helpers.family_answers import as_vllm_computes_it, quantize_tiny
from helpers.tiny_models import tiny_model

pytest.importorskip("vllm")

from qig_serve.demo import MODEL_DIR, questions

pytestmark = pytest.mark.slow

# The demonstration model's vision tower has three heads, which two ranks cannot share, and vLLM
# keeps a LLaVA's tower whole only if asked to from inside. Its processes import this file again.
PROGRAM = """
import sys
from vllm.model_executor.models import clip
from qig_serve.cli import main

clip.is_vit_use_data_parallel = lambda: True

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
QUESTIONS = 8
FLAGS = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--no-enable-prefix-caching"]
LAYOUTS = {
    "tensor": ["--tensor-parallel-size", "2", "--enforce-eager"],
    "pipeline": ["--pipeline-parallel-size", "2"],  # eager, vLLM 0.32 lacks buffers on a CPU
    "data": ["--data-parallel-size", "2", "--enforce-eager"],
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the demonstration as a batch that asks for token ids."""
    folder = tmp_path_factory.mktemp("batch")
    with (folder / "batch.jsonl").open("w") as file:
        for sample in questions.samples("test", QUESTIONS):
            body = {"messages": tiny_llava.conversation(sample.question, sample.image)}
            body |= {"temperature": 0, "max_tokens": 60, "return_token_ids": True}
            row = {"custom_id": sample.id, "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps(row | {"body": body}) + "\n")
    return folder / "batch.jsonl"


@pytest.fixture(scope="module", params=["w3a16", "w4a8"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With w3a16, output head and embedding in 8 bits: their rows are shared out, too."""
    bits = 8 if request.param == "w3a16" else 16
    target = tmp_path_factory.mktemp("demo") / "out"
    return tiny_llava.quantize(MODEL_DIR, target, request.param, vocabulary_bits=bits)


@pytest.fixture(scope="module")
def alone(
    checkpoint: Path, batch: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[int]]:
    return tokens(checkpoint, batch, tmp_path_factory.mktemp("alone"), "--enforce-eager")


def tokens(checkpoint: Path, batch: Path, folder: Path, *layout: str) -> dict[str, list[int]]:
    """Question -> token ids of the answer, by `qig-serve generate`."""
    program, output = folder / "program.py", folder / "out.jsonl"
    program.write_text(PROGRAM)
    words = ["generate", str(checkpoint), "-i", str(batch), "-o", str(output), *FLAGS, *layout]
    done = subprocess.run(
        [sys.executable, str(program), *words],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONSAFEPATH": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in rows}
    return {name: answer["token_ids"] for name, answer in answers.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(
    checkpoint: Path, batch: Path, alone: dict[str, list[int]], tmp_path: Path, layout: str
) -> None:
    assert len(alone) == QUESTIONS and all(len(ids) > 1 for ids in alone.values())
    assert tokens(checkpoint, batch, tmp_path, *LAYOUTS[layout]) == alone


def test_pipeline_without_compilation_is_refused(checkpoint: Path, batch: Path) -> None:
    words = [checkpoint, "-i", batch, "-o", batch.with_name("none.jsonl"), *FLAGS]
    words += ["--enforce-eager", "--pipeline-parallel-size", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "generate", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and "leave --enforce-eager out" in done.stderr


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w3a16, whose parts have the numbers of the whole: w4a8 quantizes a part's activations."""
    folder = tmp_path_factory.mktemp("experts")
    source = tiny_model("qwen3_vl_moe", folder / "source", moe_intermediate_size=256)
    source = as_vllm_computes_it(source, "qwen3_vl_moe")
    return quantize_tiny(source, folder / "out", "w3a16", method="rtn")


@pytest.fixture(scope="module")
def experts_alone(
    with_experts: Path, batch: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[int]]:
    return tokens(with_experts, batch, tmp_path_factory.mktemp("alone"), "--enforce-eager")


@pytest.mark.parametrize("more", [[], ["--enable-expert-parallel"]], ids=["cut", "shared out"])
def test_experts_on_two_ranks_equal_those_on_one(
    with_experts: Path, batch: Path, experts_alone: dict[str, list[int]], tmp_path: Path,
    more: list[str],
) -> None:  # fmt: skip
    assert len(experts_alone) == QUESTIONS
    assert tokens(with_experts, batch, tmp_path, *LAYOUTS["tensor"], *more) == experts_alone
