"""The demonstration checkpoints on another device: are the answers those that the CPU gave?

Two devices round sums in different orders, so bf16 answers differ here and there where two tokens
are nearly tied. How often is known: the reference holds the CPU's answers in bf16 and in fp32. A
device is within the noise if it does not differ from the CPU's bf16 answers more often than those
differ from fp32's (its 95% interval reaches that far), and if its exact match is the CPU's within
the paired interval.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gpu_vllm_report as report
import gpu_vllm_run as run

from qig_serve.demo.bundled import bundled_directory
from qig_serve.demo.questions import samples
from qig_serve.errors import UserError
from qig_serve.evaluation.statistics import clopper_pearson, exact_match, paired

CALIBRATION = 128


def checkpoint(name: str, work: Path) -> Path:
    """The checkpoint of that name, quantized on the CPU unless it is there."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    directory = work / "demo" / name
    if directory.exists():
        return directory
    model, scheme, method = name.split("-", 2)
    directory.parent.mkdir(parents=True, exist_ok=True)
    values = {"scheme": scheme, "method": method, "calib": "demo", "device": "cpu",
              "samples": 8 if method == "rtn" else CALIBRATION}  # fmt: skip
    quantize(bundled_directory(model), directory, make_recipe(values), quiet=True)
    return directory


def digest(directory: Path) -> str:
    """sha256 over the weights."""
    total = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def answers(options: argparse.Namespace, name: str, device: str, dtype: str) -> dict[str, Any]:
    """{"tokens", "texts", "layers"} of a checkpoint's answers, or {"unavailable"}."""
    out = options.work / "jobs" / f"demo-{name}-{device}-{dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    engine = {
        "dtype": dtype, "max_model_len": 512, "max_num_seqs": 32, "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 1, "video": 0}, **options.engine,
    }  # fmt: skip
    if device == "cuda":
        engine |= {  # other engines may share the card: its part is not asked for
            "mm_encoder_attn_backend": "TORCH_SDPA", "gpu_memory_utilization": 0.01,
            "kv_cache_memory_bytes": 1 << 30,
        }  # fmt: skip
    job = {
        "task": "demo", "checkpoint": str(checkpoint(name, options.work)), "device": device,
        "engine": engine, "questions": options.questions, "out": str(out),
    }  # fmt: skip
    out.with_suffix(".job").write_text(json.dumps(job))
    command = [sys.executable, str(run.HERE / "gpu_vllm_engine.py")]
    asked = argparse.Namespace(**{**vars(options), "device": device})
    return run.run_child(
        asked, f"demo-{name}-{dtype}", [*command, str(out.with_suffix(".job"))], out, {}
    )


def make_reference(options: argparse.Namespace) -> int:
    """Answers of the CPU in bf16 and fp32, a checkpoint at a time; goes on where it stopped."""
    for name in options.names:
        before = run.load(options.reference).get(name, {})
        directory = checkpoint(name, options.work)
        if before.get("sha256") == digest(directory) and before["questions"] >= options.questions:
            continue
        found = {d: answers(options, name, "cpu", d) for d in ("bfloat16", "float32")}
        if bad := [f"{d}: {a['unavailable']}" for d, a in found.items() if "unavailable" in a]:
            raise UserError(f"{name}: vLLM on the CPU failed: {'; '.join(bad)}")
        entry = {
            "sha256": digest(directory), "questions": options.questions,
            "tokens": found["bfloat16"]["tokens"], "texts": found["bfloat16"]["texts"],
            "equal_to_fp32": same(found["bfloat16"]["tokens"], found["float32"]["tokens"]),
        }  # fmt: skip
        run.merge(options.reference, [name], entry)
        print(f"{name}: {entry['equal_to_fp32']} of {options.questions} as in fp32", flush=True)
    return 0


def same(first: list[str], second: list[str]) -> int:
    """Answers that are equal, token by token."""
    return sum(a == b for a, b in zip(first, second, strict=True))


def verdict(found: dict[str, Any], known: dict[str, Any], right: list[str]) -> dict[str, Any]:
    """A device's answers against the reference's; `right` are the answers wanted."""
    n = min(len(found["tokens"]), known["questions"])
    equal = same(found["tokens"][:n], known["tokens"][:n])
    here = [exact_match(t, a) for t, a in zip(found["texts"][:n], right, strict=False)]
    there = [exact_match(t, a) for t, a in zip(known["texts"][:n], right, strict=False)]
    difference = paired(there, here)
    expected = known["equal_to_fp32"] / known["questions"]
    interval = clopper_pearson(equal, n)
    return {
        "questions": n, "equal": equal, "equal_interval": list(interval),
        "equal_expected": expected, "tokens_within_noise": interval[1] >= expected,
        "exact": sum(here) / n, "exact_cpu": sum(there) / n,
        "exact_difference_interval": list(difference.interval),
        "exact_equal_within_interval": difference.interval[0] <= 0 <= difference.interval[1],
    }  # fmt: skip


def compare(options: argparse.Namespace, about: dict[str, Any]) -> int:
    """1 if an answer could not be had or is not the CPU's within the noise."""
    failed = 0
    right = [sample.answer for sample in samples("test", options.questions)]
    reference = run.load(options.reference)
    if not reference:
        raise UserError(f"{options.reference} has no answers: make it with `reference`")
    for name in options.names or list(reference):
        place = ("demo", name)
        if run.done(options.out / run.FILE, place, about["card"]) and not options.again:
            print(f"demo {name}: compared before", flush=True)
            continue
        known = reference.get(name)
        if known is None:
            raise UserError(f"{options.reference} has no {name}: make it with `reference`")
        found = answers(options, name, options.device, "bfloat16")
        entry: dict[str, Any] = found
        if "unavailable" not in found:
            entry = {
                **verdict(found, known, right),
                "same_checkpoint": digest(checkpoint(name, options.work)) == known["sha256"],
                "layers": found["layers"],
            }
        fine = "unavailable" not in entry and entry["exact_equal_within_interval"] and (
            entry["tokens_within_noise"] or not entry["same_checkpoint"]
        )  # fmt: skip
        failed += not fine
        run.merge(options.out / run.FILE, place, {**entry, "machine": about})
        print(f"demo {name}: {report.in_short(entry)}", flush=True)
    return int(failed > 0)
