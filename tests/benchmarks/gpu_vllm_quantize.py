"""How long qig+ takes on a model of full size, and how much memory: random weights and samples."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = 12_000  # of the tokenizer that gpu_vllm_models.py makes: w1, w2, ...


def write_samples(
    directory: Path, count: int, pictures: int, side: int, words: int, answer: int, known: int
) -> Path:
    """samples.jsonl: so many pictures, words and words of answer each; different in every sample.

    `known`: words the tokenizer knows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draw, pixels = random.Random(0), np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(1, known)}" for _ in range(length))

    lines = []
    for index in range(count):
        content: list[dict[str, Any]] = []
        for place in range(pictures):
            picture = Image.fromarray(pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            name = f"{index}-{place}.png"
            picture.resize((side, side), Image.Resampling.BICUBIC).save(directory / name)
            content.append({"type": "image_url", "image_url": {"url": name}})
        content.append({"type": "text", "text": text(words)})
        message = {"role": "user", "content": content}
        line = {"id": str(index), "messages": [message], "answer": text(answer)}
        lines.append(json.dumps(line))
    path = directory / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(
    model: Path, work: Path, scheme: str, count: int, tiny: bool, side: int, device: str
) -> dict[str, Any]:
    """Seconds, peak bytes on the device and of the process, and how many tokens there were."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    output = work / f"{model.parent.name}-{scheme}"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.parent / f".{output.name}.partial", ignore_errors=True)
    # three pictures of 256 tokens and 230 words: about 1,000 tokens
    sizes = (1, 56, 20, 8, 400) if tiny else (3, side, 200, 30, WORDS)
    samples = write_samples(work / "samples", count, *sizes)
    values = {"scheme": scheme, "method": "qig+", "calib": str(samples), "samples": count,
              "device": device}  # fmt: skip
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    report = quantize(model, output, make_recipe(values), quiet=True)
    seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "samples": count,
        "calibration": {k: v for k, v in report.calibration.items() if k == "tokens"},
        "blocks": len(report.blocks),
        "peak_device_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "estimate": report.estimate,
        "checkpoint_bytes": sum(p.stat().st_size for p in output.glob("*.safetensors")),
    }
