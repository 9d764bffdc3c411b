"""Coverage-guided fuzzing of everything that reads a stranger's manifest or configuration.

    pip install atheris        # not among the development tools: it has wheels for few Pythons
    python tests/benchmarks/fuzz_readers.py --seconds 600 [--work DIR] [READER ...]

Each input is a file in the place of the one that the reader opens; the first byte of the input
chooses the reader, the rest is either the file's text, or decisions that build JSON out of the
names the readers know. A reader may return or raise UserError with one sentence. Anything else is
printed, once per place that it comes from, and its input saved in DIR; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["qig_serve"]):
    from qig_serve import inspection, model_directory, records
    from qig_serve.errors import UserError
    from qig_serve.offline import recipe
    from qig_serve.offline.calibration import sources
    from qig_serve.offline.source import loaded_model, tensors
    from qig_serve.serving import describe

CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "num_attention_heads": 2,
    },
    "image_token_index": 9,
}
QUANTIZATION = {
    "quant_method": "qig",
    "format_version": 1,
    "scheme": "w3a16",
    "bits": 3,
    "group_size": 128,
    "ignore": ["lm_head"],
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "method": "qig",
    "produced_by": "x",
    "calibration": {"source": "demo", "samples": 4, "sha256": "ab", "seed": 0},
    "tensor_parallel_sizes": [1, 2],
    "recipe": {"scheme": "w3a16"},
    "summary": {"blocks": 1},
}
QUANTIZED = CONFIG | {"quantization_config": QUANTIZATION}
DOWN = "model.layers.0.mlp.down_proj.weight"
HEADER = {
    f"{DOWN}_packed": {"dtype": "I32", "shape": [128, 24], "data_offsets": [0, 12288]},
    f"{DOWN}_scale": {"dtype": "BF16", "shape": [128, 2], "data_offsets": [12288, 12800]},
    f"{DOWN}_zero_point": {"dtype": "U8", "shape": [128, 2], "data_offsets": [12800, 13056]},
    "lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [13056, 13060]},
}
WEIGHT_MAP = dict.fromkeys(HEADER, "model.safetensors")
INDEX = {"metadata": {"total_size": 13060}, "weight_map": WEIGHT_MAP}
HASHES = {"format_version": 1, "files": {"config.json": "00", "../x": "00"}}
RECIPE = {"scheme": "w4a8", "method": "qig+", "samples": 4, "grid": 20, "iqr": True, "calib": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CONTENT = [IMAGE, {"type": "text", "text": "what?"}]
SAMPLE = {"id": "7", "type": "t", "answer": "a", "messages": [{"role": "user", "content": CONTENT}]}
TURNS = [{"from": "human", "value": "<image>hm?"}, {"from": "gpt", "value": "so"}]
TALKS = [{"id": "1", "image": "x.png", "conversations": TURNS}]


def shard(header: bytes) -> bytes:
    """A safetensors file with that header and the data of HEADER."""
    return len(header).to_bytes(8, "little") + header + bytes(13060)


def read_recipe(path: Path) -> None:
    """As `quantize --recipe` does."""
    recipe.make_recipe(recipe.load_recipe(str(path)), "recipe")


def serve_report(directory: Path) -> None:
    """What `qig-serve serve` looks at before vLLM starts."""
    model_directory.read_manifest(directory)
    describe.describe(directory, describe.serving_dtype(directory))


def make_readers(folder: Path) -> dict[str, tuple[Path, Any, Callable[[], Any]]]:
    """Name -> the file it reads, a good value of it, and the call. Other files stay as they are."""
    good, source = folder / "checkpoint", folder / "source"
    for directory, config in ((good, QUANTIZED), (source, CONFIG)):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / inspection.INDEX_FILE).write_text(json.dumps(INDEX))
        (directory / "model.safetensors").write_bytes(shard(json.dumps(HEADER).encode()))
        (directory / inspection.HASHES_FILE).write_text(json.dumps(HASHES))
    fresh = {
        name: shutil.copytree(good if name in ON_CHECKPOINT else source, folder / name)
        for name in (*ON_CHECKPOINT, *ON_SOURCE)
    }
    weights, config, index = "model.safetensors", "config.json", inspection.INDEX_FILE
    recipe_file, lines, talks = folder / "r.yaml", folder / "s.jsonl", folder / "talks.json"
    return {
        "inspect": (
            fresh["inspect"] / config,
            QUANTIZED,
            lambda: inspection.inspect(fresh["inspect"]),
        ),
        "index": (fresh["index"] / index, INDEX, lambda: inspection.inspect(fresh["index"])),
        "header": (fresh["header"] / weights, HEADER, lambda: inspection.inspect(fresh["header"])),
        "hashes": (
            fresh["hashes"] / inspection.HASHES_FILE,
            HASHES,
            lambda: inspection.verify(fresh["hashes"]),
        ),
        "serve": (fresh["serve"] / config, QUANTIZED, lambda: serve_report(fresh["serve"])),
        "serve-header": (
            fresh["serve-header"] / weights,
            HEADER,
            lambda: serve_report(fresh["serve-header"]),
        ),
        "model": (
            fresh["model"] / config,
            CONFIG,
            lambda: loaded_model.quantizable_config(fresh["model"]),
        ),
        "model-index": (
            fresh["model-index"] / index,
            INDEX,
            lambda: tensors.SourceCheckpoint(fresh["model-index"]).close(),
        ),
        "recipe": (recipe_file, RECIPE, lambda: read_recipe(recipe_file)),
        "samples": (lines, SAMPLE, lambda: records.read_samples(lines)),
        "talks": (talks, TALKS, lambda: sources.load_calibration(str(talks), 4)),
    }


ON_CHECKPOINT = ("inspect", "index", "header", "hashes", "serve", "serve-header")
ON_SOURCE = ("model", "model-index")


def changed(value: Any, data: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    """A JSON value like `value`, some of it replaced, dropped, added or wrapped."""
    odd = data.ConsumeIntInRange(0, 23)
    if odd == 1:
        return data.PickValueInList(
            [None, True, 0, -1, 1 << 70, 1e308, float("nan"), "", "\x00", "../x", [], {}, [[]]]
        )
    if odd == 2:
        return data.ConsumeUnicode(12)
    if odd == 3:
        return data.ConsumeInt(8)
    if odd == 4 and depth < 6:
        return [changed(value, data, depth + 1)]
    if odd == 5 and depth < 6:
        return {data.ConsumeUnicode(6): changed(value, data, depth + 1)}
    if isinstance(value, dict):
        out = {}
        for key, item in value.items():
            fate = data.ConsumeIntInRange(0, 15)
            if fate != 1:
                name = data.ConsumeUnicode(6) if fate == 2 else key
                out[name] = changed(item, data, depth + 1)
        return out
    if isinstance(value, list):
        return [changed(v, data, depth + 1) for v in value] * data.ConsumeIntInRange(0, 2)
    return value


def main() -> None:
    """Fuzz until the time is over; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--work", type=Path, help="corpus and findings (default: a new folder)")
    parser.add_argument("readers", nargs="*", metavar="READER")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    readers = make_readers(Path(tempfile.mkdtemp(prefix="fuzz-files-", dir=memory())))
    names = args.readers or list(readers)
    for number, name in enumerate(names):
        text = json.dumps(readers[name][1]).encode()
        (corpus / f"{name}-text").write_bytes(bytes([2 * number]) + text)
        (corpus / f"{name}-built").write_bytes(bytes([2 * number + 1]) + bytes(400))
    for path, good, read in (readers[name] for name in names):  # what they import takes its time
        text = json.dumps(good).encode()
        path.write_bytes(shard(text) if path.suffix == ".safetensors" else text)
        with contextlib.suppress(UserError):
            read()
    reported: Counter[str] = Counter()
    started = last = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal last
        if not data:
            return
        choice, built = divmod(data[0] % (2 * len(names)), 2)
        path, good, read = readers[names[choice]]
        text = data[1:]
        if built:
            value = changed(good, atheris.FuzzedDataProvider(text))
            text = json.dumps(value).encode("utf-8", "surrogatepass")
        header = path.suffix == ".safetensors"
        path.write_bytes(shard(text) if header and (built or data[0] < 128) else text)
        try:
            read()
            reported[f"{names[choice]}: read"] += 1
        except UserError:
            reported[f"{names[choice]}: refused"] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            crash = (
                f"{names[choice]}-{type(error).__name__}-{Path(place.filename).stem}{place.lineno}"
            )
            reported[f"CRASH {crash}"] += 1
            if reported[f"CRASH {crash}"] == 1:
                (work / crash).write_bytes(text)
                traceback.print_exc()
        if time.monotonic() - last > 30:
            last = time.monotonic()
            report()

    def report() -> None:
        seconds = time.monotonic() - started
        print(f"{seconds:.0f} s, {sum(reported.values())} inputs: {dict(sorted(reported.items()))}")
        sys.stdout.flush()

    def end() -> None:
        report()
        if any(name.startswith("CRASH") for name in reported):
            os._exit(1)

    atexit.register(end)

    flags = [f"-max_total_time={args.seconds}", "-max_len=4096", f"-artifact_prefix={work}/"]
    atheris.Setup([sys.argv[0], *flags, "-rss_limit_mb=6000", "-timeout=120", str(corpus)], one)
    atheris.Fuzz()


def memory() -> str | None:
    """A folder in memory, where there is one: the files are written many thousand times."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
