"""Peak memory of a quantization against the number of decoder layers: it must not grow.

    python tests/benchmarks/bench_memory.py

Random LLaVA models of one width (hidden 1024, intermediate 2816: 25.7 MB per layer in bf16) with 4,
8 and 16 layers, with activations in host memory and on disk. Each is quantized in a process of its
own, forked from one that has imported all, so that the interpreter weighs the same in each. There,
a thread reads /proc/self/status every 20 ms:

    anonymous   RssAnon: memory that only this process has and that cannot be dropped
    resident    VmRSS: with it, pages of mapped files (libraries, safetensors), as `top` shows

and torch counts the GPU's if there is one. glibc maps matrices above 32 MB, which those of real
models are, each by itself; here it is made to do so from 1 MB on, for in a heap they leave holes
that are now larger and now smaller.

The table says how much more than the smallest model the largest takes; above --limit (10%) the
exit status is 1. Writes bench_memory.json and .png to --results.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe, make_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.tiny_models import FAMILIES, chat_template, make_tokenizer, published_name

matplotlib.use("Agg")
LAYERS = (4, 8, 16)
SAMPLES = 2
HIDDEN, INTERMEDIATE, HEADS = 1024, 2816, 8
KINDS = ("anonymous", "resident", "device")
_MMAP = "MALLOC_MMAP_THRESHOLD_"


def build_model(directory: Path, layers: int, found: Any) -> None:
    """A random LLaVA with one shard per decoder layer, written a shard at a time."""
    tiny = FAMILIES["llava"]
    tokenizer = make_tokenizer(tiny)
    config = tiny.config(tokenizer)
    text = config.text_config
    text.hidden_size, text.intermediate_size = HIDDEN, INTERMEDIATE
    text.num_attention_heads = text.num_key_value_heads = HEADS
    text.head_dim, text.num_hidden_layers = HIDDEN // HEADS, layers
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    tiny.processor(tokenizer, chat_template(tiny.image_text)).save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".layers.")[1].split(".")[0] if ".language_model.layers." in name else "x"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    weight_map = {}
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * 0.02
            value += 1 if name.endswith("norm.weight") else 0
            tensors[published_name("llava", name)] = value.to(torch.bfloat16)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    found.put(sum(p.stat().st_size for p in directory.glob("*.safetensors")))


def write_samples(directory: Path, count: int) -> Path:
    """Picture-and-answer samples."""
    lines = []
    for i in range(count):
        Image.new("RGB", (56, 56), (i * 37 % 256, 80, 160)).save(directory / f"{i}.png")
        content = [
            {"type": "image_url", "image_url": {"url": f"{i}.png"}},
            {"type": "text", "text": "What color is the star? Describe it."},
        ]
        messages = [{"role": "user", "content": content}]
        answer = "a large red star " * (1 + i % 3)
        lines.append(json.dumps({"id": str(i), "messages": messages, "answer": answer}))
    path = directory / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class PeakMemory(threading.Thread):
    """Largest RssAnon and VmRSS of this process, in bytes, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()
        self.peak = {"RssAnon": 0, "VmRSS": 0}

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]) * 1024)

    def stop(self) -> dict[str, int]:
        """Ends the thread; the peaks."""
        self._stopped.set()
        self.join()
        return self.peak


def measure(model: Path, output: Path, recipe: QuantRecipe, found: Any) -> None:
    """One quantization in this process; puts seconds and bytes into the queue `found`."""
    gc.collect()
    thread = PeakMemory()
    thread.start()
    started = time.monotonic()
    quantize(model, output, recipe, quiet=True)
    seconds = time.monotonic() - started
    peak = thread.stop()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    sizes = dict(zip(KINDS, (peak["RssAnon"], peak["VmRSS"], device), strict=True))
    found.put({"seconds": round(seconds, 1), **sizes})


def in_a_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a forked process, which must not have used torch's threads before."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=task, args=(*arguments, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.1)
    if queue.empty() and process.exitcode:
        raise SystemExit(f"{task.__name__} failed with status {process.exitcode}")
    found = queue.get()
    process.join()
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory against layers, a line each for where activations wait."""
    figure, axes = matplotlib.pyplot.subplots(figsize=(6, 4))
    style = {"ram": "-", "disk": "--"}
    for offload, line in style.items():
        chosen = [r for r in rows if r["offload"] == offload]
        for kind, mark in zip(KINDS, "os^", strict=True):
            if any(r[kind] for r in chosen):
                values = [r[kind] / 2**20 for r in chosen]
                label = f"{kind}, --offload {offload}"
                axes.plot([r["layers"] for r in chosen], values, line, marker=mark, label=label)
    chosen = [r for r in rows if r["offload"] == "ram"]
    weights = [r["weights"] / 2**20 for r in chosen]
    axes.plot([r["layers"] for r in chosen], weights, ":", color="gray", label="the model's file")
    axes.set_xlabel("decoder layers")
    axes.set_ylabel("peak, MiB")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({r["layers"] for r in rows}))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(rows: list[dict[str, Any]], limit: float) -> bool:
    """Prints the table and the growth; whether all of it is within the limit."""
    print("layers  offload  weights MiB  anonymous MiB  resident MiB  GPU MiB  seconds")
    for r in rows:
        sizes = [r[k] / 2**20 for k in ("weights", *KINDS)]
        print(
            f"{r['layers']:6}  {r['offload']:7}  {sizes[0]:11.0f}  {sizes[1]:13.0f}  "
            f"{sizes[2]:12.0f}  {sizes[3]:7.0f}  {r['seconds']:7.1f}"
        )
    flat = True
    for offload in sorted({r["offload"] for r in rows}):
        chosen = [r for r in rows if r["offload"] == offload]
        for kind in KINDS:
            low, high = (f(r[kind] for r in chosen) for f in (min, max))
            if low:
                flat &= high <= low * (1 + limit)
                print(f"--offload {offload}, {kind}: largest {high / low - 1:.1%} above smallest")
    return flat


def main() -> int:
    """Measure, print, write; 1 when memory grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--scheme", default="w3a16")
    parser.add_argument("--method", default="qig")
    parser.add_argument("--limit", type=float, default=0.1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if _MMAP not in os.environ:  # read by glibc when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, _MMAP: str(1 << 20)})
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        calib = write_samples(root, SAMPLES)
        for layers in args.layers:
            model = root / f"model-{layers}"
            weights = in_a_process(build_model, model, layers)
            for offload in ("ram", "disk"):
                values = {"scheme": args.scheme, "method": args.method, "calib": str(calib)}
                values |= {"samples": SAMPLES, "grid": 2, "steps": 1, "offload": offload}
                output = root / f"{layers}-{offload}"
                found = in_a_process(measure, model, output, make_recipe(values))
                rows.append({"layers": layers, "offload": offload, "weights": weights, **found})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    rows.sort(key=lambda r: (r["layers"], r["offload"]))
    flat = report(rows, args.limit)
    args.results.mkdir(parents=True, exist_ok=True)
    result = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "rows": rows}
    result |= {"scheme": args.scheme, "method": args.method}
    (args.results / "bench_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, args.results / "bench_memory.png")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
