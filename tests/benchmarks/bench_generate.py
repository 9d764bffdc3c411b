"""`qig-serve generate` against vLLM's own LLM.chat on the same requests.

    python tests/benchmarks/bench_generate.py DIR [--requests 2000 --tokens 16 --rounds 5]

Each runs in a process of its own, in turns; the time is from the first request to the last answer
with the model loaded. The goal is 0.95 of LLM.chat's rate, as the median of the rounds' ratios:
on two cores with a toy model the front end is a third of the work. Both read pictures as data URLs
and bind threads as vLLM does by itself, which leaves a core to the front end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOAL = 0.95
FLAGS = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32"]
FLAGS += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--no-enable-prefix-caching"]


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Questions about four pictures."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from helpers import tiny_llava

    pictures = [tiny_llava.picture(i) for i in range(4)]
    return [tiny_llava.conversation(f"What is number {i}?", pictures[i % 4]) for i in range(count)]


def time_chat(directory: Path, count: int, tokens: int) -> float:
    """Seconds that LLM.chat takes."""
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory),
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 1, "video": 0},
        enable_prefix_caching=False,
    )
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests: Any = conversations(count)
    llm.chat(requests[:1], parameters, use_tqdm=False)
    began = time.perf_counter()
    llm.chat(requests, parameters, use_tqdm=False)
    return time.perf_counter() - began


def time_generate(directory: Path, count: int, tokens: int) -> float:
    """Seconds that the batch takes."""
    from qig_serve.batch import generate

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        with source.open("w") as file:
            for i, messages in enumerate(conversations(count)):
                body = {"messages": messages, "temperature": 0, "ignore_eos": True}
                row = {"custom_id": str(i), "body": body | {"max_tokens": tokens}}
                file.write(json.dumps(row) + "\n")
        output = Path(folder) / "out.jsonl"
        totals = generate(directory, source, output, flags=FLAGS, quiet=True, give_way=True)
        assert (totals.done, totals.failed, totals.tokens) == (count, 0, count * tokens)
        return totals.seconds


def main() -> int:
    """Print both rates and their ratio; exit status 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=["chat", "generate"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure = time_chat if args.one == "chat" else time_generate
        print("SECONDS", measure(args.directory, args.requests, args.tokens))
        return 0
    seconds: dict[str, list[float]] = {"chat": [], "generate": []}
    for _ in range(args.rounds):
        for name, times in seconds.items():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ,
            )
            times.append(float(done.stdout.rpartition("SECONDS ")[2].split()[0]))  # then vLLM logs
            rate = args.requests / times[-1]
            print(f"{name}: {times[-1]:.2f} s, {rate:.1f} requests/s", flush=True)
    pairs = zip(seconds["chat"], seconds["generate"], strict=True)
    ratio = statistics.median(chat / generate for chat, generate in pairs)
    print(f"generate runs at {ratio:.3f} of LLM.chat (goal {GOAL})")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
