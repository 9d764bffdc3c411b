"""One vLLM engine in a process of its own: what gpu_vllm.py asks of it goes in and out as JSON.

    python tests/benchmarks/gpu_vllm_engine.py JOB.json

JOB.json: {"task": "measure" or "demo", "checkpoint", "engine": options of vLLM's LLM, "out": where
the result goes, and the task's own settings}. A process per engine, so that memory is free
afterwards, and a rival that fails takes nothing with it.

`measure` starts beside other engines: it imports vLLM, waits for its checkpoint, starts, and waits
for its turn, the file OUT.turn: {"until": monotonic seconds, "usual": piece -> seconds}. Then it
takes the lock that all engines share and measures piece by piece; the result is written after each.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_vllm_llm import Engine, wait_for


def write(path: Path, result: dict[str, Any]) -> None:
    """Atomically: a reader finds the old result or the new one."""
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").replace(path)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Start-up; then, when it is this engine's turn, the pieces; the result is written as it grows.

    A piece that fails, or would not end in time, is named with the reason.
    """
    from gpu_vllm_configs import MODELS

    model = MODELS[job["model"]]
    job["image_text"] = model.row.image_text.replace("\\n", "\n")
    job.setdefault("picture", model.picture)
    engine, out = Engine(job), Path(job["out"])
    result: dict[str, Any] = {
        "start_up": engine.start_up, "started_beside": job["started_beside"],
        "waited_for_checkpoint_seconds": engine.waited, "layers": engine.kernels(),
        "memory": engine.memory(), "decode": {}, "first_token": {}, "profile": {},
        "seconds": {}, "not_measured": {},
    }  # fmt: skip
    write(out, result)
    turn = out.with_suffix(".turn")
    wait_for(turn)
    reported = json.loads(turn.read_text())
    with Path(job["lock"]).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        take_pieces(engine, job["pieces"], reported, lambda: write(out, result), result)
    return result


def take_pieces(
    engine: Any, pieces: Iterable[str], reported: dict[str, Any], note: Callable[[], None],
    result: dict[str, Any],
) -> None:  # fmt: skip
    """Measure what still ends in time, most important first; `note` is called after each piece."""
    broken = False
    for piece in pieces:
        what, size = piece.split()
        begun = time.monotonic()
        if broken:
            result["not_measured"][piece] = "the engine did not recover from the failure before"
            continue
        if begun + reported["usual"][piece] > reported["until"]:
            result["not_measured"][piece] = "no time was left"
            continue
        try:
            if what == "profile":
                found = engine.profile_prefill() if size == "prefill" else (
                    engine.profile_decode(int(size))
                )  # fmt: skip
            else:
                found = getattr(engine, what)(int(size))
                result["memory"] = engine.memory()  # before the profiler takes its own
            result[what][size] = found
            result["seconds"][piece] = round(time.monotonic() - begun, 2)
        except Exception as reason:  # whatever it is, the pieces before it stay
            traceback.print_exc()
            result["not_measured"][piece] = f"{type(reason).__name__}: {reason}"[:300]
            broken = not engine.recovers()
        note()


def demo(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers to the first questions of the test split: token ids, as text, and texts."""
    from vllm import SamplingParams

    from qig_serve.demo.questions import samples

    engine = Engine(job)
    asked = list(samples("test", job["questions"]))
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": sample.image},
                    {"type": "text", "text": sample.question},
                ],
            }
        ]
        for sample in asked
    ]
    outputs = engine.llm.chat(
        conversations, SamplingParams(temperature=0, max_tokens=160), use_tqdm=False
    )
    return {
        "tokens": [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs],
        "texts": [output.outputs[0].text for output in outputs],
        "layers": engine.kernels(),
    }


def main() -> int:
    """See the head of this file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    if job["task"] == "demo":
        write(out, demo(job))
        return 0
    write(out, measure(job) | {"ended": True})
    # An engine that ends frees gigabytes, which the next one would feel: all are ended together.
    wait_for(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
