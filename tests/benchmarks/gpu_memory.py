"""What quantizing takes of a GPU's memory, counted without one.

    python tests/benchmarks/gpu_memory.py [--scales 16 8 4] [--words 120] [--options scheme=w4a8]

Two blocks of Qwen2.5-VL-7B's shape (hidden 3584, MLP 18944, 28 heads, 4 of keys and values), with
widths a fraction 1 / SCALE, are quantized on a pretended GPU (tests/helpers/pretended_gpu.py),
which counts what tensors there hold; what an operation takes for itself is not in it, and neither
are CUDA's context and the allocator's holes. Matrices grow with the square of the width,
activations in proportion to it, attention not at all (but with the square of the tokens): the last
row puts such a sum through the three models, and says what it is at full width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import one_gpu

HIDDEN, INTERMEDIATE, HEADS, KEYS, BLOCKS = 3584, 18944, 28, 4, 2
SAMPLES = 2


def build_model(directory: Path, scale: int) -> int:
    """A random LLaVA with a Qwen2 decoder of that scale; bytes of a block in 16 bits."""
    import torch
    from helpers.tiny_models import FAMILIES, chat_template, make_tokenizer
    from transformers import AutoModelForImageTextToText

    tiny = FAMILIES["llava_onevision"]
    tokenizer = make_tokenizer(tiny)
    config = tiny.config(tokenizer)
    text = config.text_config
    text.hidden_size, text.intermediate_size = HIDDEN // scale, INTERMEDIATE // scale
    text.num_attention_heads, text.num_key_value_heads = HEADS, KEYS
    text.head_dim = HIDDEN // scale // HEADS
    text.num_hidden_layers, text.max_position_embeddings = BLOCKS, 4096
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tiny.processor(tokenizer, chat_template(tiny.image_text)).save_pretrained(directory)
    block = model.model.language_model.layers[0]
    return sum(2 * parameter.numel() for parameter in block.parameters())


def write_samples(directory: Path, words: int) -> Path:
    """A small picture and a long answer each."""
    from PIL import Image

    lines = []
    for i in range(SAMPLES):
        Image.new("RGB", (56, 56), (i * 37 % 256, 80, 160)).save(directory / f"{i}.png")
        image = {"type": "image_url", "image_url": {"url": f"{i}.png"}}
        content = [image, {"type": "text", "text": "What is to be seen?"}]
        answer = " ".join(["a large red star"] * (words // 4))
        messages = [{"role": "user", "content": content}]
        lines.append(json.dumps({"id": str(i), "messages": messages, "answer": answer}))
    path = directory / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(scale: int, words: int, options: dict[str, str]) -> dict[str, Any]:
    """A row: what a run on the pretended GPU held at most."""
    import torch
    from helpers.pretended_gpu import pretended_gpu

    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import make_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        block = build_model(folder / "model", scale)
        calib = write_samples(folder, words)
        fields = {"calib": str(calib), "samples": SAMPLES, "device": "cuda"}
        recipe = make_recipe(fields | {"allow_fallbacks": True} | options)
        started = time.monotonic()
        with pretended_gpu():
            torch.cuda.reset_peak_memory_stats()
            report = quantize(folder / "model", folder / "out", recipe, quiet=True)
            peak = torch.cuda.max_memory_allocated()
    return {
        "scale": scale, "block_bytes": block, "peak_bytes": peak,
        "estimated_bytes": report.estimate["device_bytes"],
        "tokens": report.calibration["tokens"], "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def at_full_width(rows: list[dict[str, Any]]) -> float:
    """Bytes at scale 1, of the parabola through the three largest models (Lagrange)."""
    largest = sorted(rows, key=lambda row: row["scale"])[:3]
    peaks = {1 / row["scale"]: row["peak_bytes"] for row in largest}
    return sum(
        peak * math.prod((1 - other) / (width - other) for other in peaks if other != width)
        for width, peak in peaks.items()
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints a row a scale, and what it would be at full width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", nargs="+", type=int, default=[16, 8, 4])
    parser.add_argument("--words", type=int, default=120, help="of an answer; a token each, about")
    parser.add_argument("--options", nargs="*", default=[], help="of the recipe, FIELD=VALUE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    one_gpu.load()  # before torch
    options = dict(option.split("=", 1) for option in given.options)
    rows = []
    for scale in given.scales:
        rows.append(row := measure(scale, given.words, options))
        blocks = row["peak_bytes"] / row["block_bytes"]
        print(
            f"width / {scale}: {row['peak_bytes'] / 2**20:.0f} MiB, {blocks:.1f} blocks in 16 bits;"
            f" the dry run said {row['estimated_bytes'] / 2**20:.0f} ({row['seconds']} s, "
            f"{sum(row['tokens'].values())} tokens)",
            flush=True,
        )
    found: dict[str, Any] = {"options": options, "rows": rows, "torch": version("torch")}
    if len(rows) > 2:
        found["full_width_bytes"] = at_full_width(rows)
        print(f"full width: {found['full_width_bytes'] / 2**30:.1f} GiB")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
