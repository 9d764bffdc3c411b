"""Stage rivals: other kernels beside ours, each in a process of its own, with its error.

    python tests/benchmarks/gpu_kernels_rivals.py NAME FILE    # one of them, rows into FILE

Only those that import are begun. They import, build and compile at the same time, on as many cores,
and wait for one another to be timed alone. All are timed in the same way: a launch in a CUDA graph
after a write of 256 MB, so that L2 is cold, less the time of that write (which adds about 2 us of a
lone launch to each, ours and cuBLAS's included). Errors are against fp32 with the weights before
quantization, so they hold the quantization's own: compare those of the same bits. A second version
of Humming is taken from the folder that the variable OTHER_HUMMING names.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_kernels_plan import Context, Failed, write_json

SHAPE = (37888, 3584)
"""gate_up of Qwen2-VL-7B."""
TOKENS = (1, 16, 64, 512, 2048)
GROUP = 128
LIMIT = 40
"""Seconds that a rival may take to import, build and compile."""
TIMING = 8
"""Seconds that its timing may take."""
ALONE = ("gemlite_w4a8",)
"""What tunes itself in its first calls, and has the GPU for itself meanwhile: after all others."""
LOCK = ".rivals.lock"
STUBS = "/usr/local/cuda/lib64/stubs"
FLUSH = 1 << 28
LAUNCHES = 8

Call = Callable[[], Any]
Build = Callable[[Any], Callable[[Any], Any]]
"""weight [N, K] -> a function of x [M, K]."""


def ours(scheme_name: str) -> Build:
    """Our kernels, with what makes integers of activations."""

    def build(weight: Any) -> Callable[[Any], Any]:
        from qig_serve import packing
        from qig_serve.formats import SCHEMES
        from qig_serve.kernels import ops

        scheme, (n, k) = SCHEMES[scheme_name], weight.shape
        exact = weight.float()
        scale, zero = packing.minmax_params(
            exact, scheme, packing.scale_dtype(scheme, weight.dtype)
        )
        codes = packing.quantize(exact, scale, zero, scheme)
        stored = packing.pack_linear(codes, scale, zero, scheme, weight.dtype)
        prepared = ops.prepare(scheme, stored, weight.dtype)
        return lambda x: ops.linear(scheme, x, prepared, n, k)

    return build


def cublas(weight: Any) -> Callable[[Any], Any]:
    """bf16."""
    import torch

    return lambda x: torch.nn.functional.linear(x, weight)


def humming(scheme: str) -> Build:
    """Humming at the same bits: 3-bit groups of 128, or int4 with int8 activations."""

    def build(weight: Any) -> Callable[[Any], Any]:
        from humming.layer import HummingLayer

        shape = {
            "shape_n": weight.shape[0],
            "shape_k": weight.shape[1],
            "torch_dtype": weight.dtype,
        }
        few = scheme == "w3a16"
        words: dict[str, Any] = {
            "weight_config": {"dtype": "uint3", "group_size": GROUP} if few else {"dtype": "int4"}
        }
        if not few:
            words["input_config"] = {"dtype": "int8"}
        try:
            layer = HummingLayer(**shape, **words)
        except TypeError:  # of before 0.1.10
            old = {"b_dtype": "uint3", "weight_scale_group_size": GROUP}
            layer = HummingLayer(
                **shape, **(old if few else {"a_dtype": "int8", "b_dtype": "int4"})
            )
        layer = layer.cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        return lambda x: layer(x)

    return build


def gemlite(weight: Any) -> Callable[[Any], Any]:
    """GemLite's int4 weights with dynamically quantized int8 activations."""
    import torch
    from gemlite.core import DType, GemLiteLinear

    n, k = weight.shape
    scale = weight.abs().amax(1, keepdim=True) / 7
    codes = (weight / scale).round().clamp(-7, 7).to(torch.int8) + 8
    layer = GemLiteLinear(
        4, group_size=k, in_features=k, out_features=n, input_dtype=DType.INT8,
        output_dtype=DType.BF16, scaled_activations=True,
    )  # fmt: skip
    layer.pack(codes.to(torch.uint8), scale, 8, None)
    return lambda x: layer(x)


def marlin(weight: Any) -> Callable[[Any], Any]:
    """vLLM's Marlin W4A16, groups of 128: one bit more than w3a16, and the usual alternative."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    kind, (n, k) = scalar_types.uint4b8, weight.shape
    _, packed, scale, g_idx, sort, _ = marlin_utils_test.marlin_quantize(
        weight.t().contiguous(), kind, GROUP, False
    )
    zero = marlin_utils.marlin_make_empty_g_idx(weight.device)
    workspace = marlin_utils.marlin_make_workspace_new(weight.device)
    return lambda x: marlin_utils.apply_gptq_marlin_linear(
        x, packed, scale, zero, g_idx, sort, workspace, kind, n, k, True
    )


def machete(weight: Any) -> Callable[[Any], Any]:
    """vLLM's Machete W4A16 (Hopper)."""
    from vllm import _custom_ops as custom
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        pack_rows,
        quantize_weights,
    )
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    _, codes, scale, _ = quantize_weights(weight.t().contiguous(), kind, GROUP)
    packed = pack_rows(codes, kind.size_bits, *codes.shape).t().contiguous().t()
    ready = custom.machete_prepack_B(packed, weight.dtype, kind, scale.dtype)
    return lambda x: custom.machete_mm(
        x, ready, kind, b_group_scales=scale, b_group_size=GROUP, out_type=x.dtype
    )


def cutlass_int8(weight: Any) -> Callable[[Any], Any]:
    """vLLM's CUTLASS W8A8 with its own dynamic activation quantization."""
    import torch
    from vllm import _custom_ops as custom

    scale = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scale).round().to(torch.int8).t()

    def call(x: Any) -> Any:
        quantized, token_scale, _ = custom.scaled_int8_quant(x)
        return custom.cutlass_scaled_mm(quantized, codes, token_scale, scale, x.dtype)

    return call


RIVALS: dict[str, tuple[str, Build]] = {
    "cublas_bf16": ("torch", cublas),
    "w3a16": ("torch", ours("w3a16")),
    "w4a8": ("torch", ours("w4a8")),
    "machete_w4a16": ("vllm", machete),
    "humming_w3a16": ("humming", humming("w3a16")),
    "humming_w4a8": ("humming", humming("w4a8")),
    "marlin_w4a16": ("vllm", marlin),
    "gemlite_w4a8": ("gemlite", gemlite),
    "cutlass_w8a8": ("vllm", cutlass_int8),
}
"""Name -> (module that must be there, how it is built), in the order in which they are timed."""
OTHER = {"humming_w3a16_other": "humming_w3a16", "humming_w4a8_other": "humming_w4a8"}


def cold_microseconds(call: Call, flush: Call) -> tuple[float, str]:
    """A launch with cold L2, and how it was timed: in a graph, or one by one if that fails."""
    import torch

    from qig_serve.kernels.tuning import time_microseconds

    def both() -> None:
        flush()
        call()

    try:
        together = time_microseconds([both] * LAUNCHES)
        return together - time_microseconds([flush] * LAUNCHES), "graph"
    except RuntimeError:  # what synchronizes or allocates cannot be captured
        torch.cuda.synchronize()
    times = []
    for _ in range(LAUNCHES):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2], "events"


@contextlib.contextmanager
def holding(path: Path, kind: int) -> Iterator[None]:
    """A lock on a file: shared by those that build, exclusive to the one that is timed."""
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


def measure_one(name: str, path: Path) -> None:
    """Rows of a rival into a file, one by one: what is there when the time is up counts."""
    lock, found = path.with_name(LOCK), dict[str, Any](rows=[])
    signal.alarm(LIMIT)
    with holding(lock, fcntl.LOCK_SH):
        calls = _build(name, path, found)
    signal.alarm(0)
    import torch

    buffer = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    with holding(lock, fcntl.LOCK_EX):
        signal.alarm(TIMING)
        for row in found["rows"]:
            if row["m"] in calls:
                try:
                    row["us"], row["how"] = cold_microseconds(calls[row["m"]], buffer.zero_)
                except Exception as reason:  # a rival's failure, of whatever kind, is a result
                    row["unavailable"] = f"{type(reason).__name__}: {reason}"[:300]
                write_json(path, found)


def _build(name: str, path: Path, found: dict[str, Any]) -> dict[int, Call]:
    """M -> a call that has run once; rows with its error and the seconds of that first call."""
    import torch

    (n, k), calls = SHAPE, {}
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.05
    begun = time.monotonic()
    call = RIVALS[OTHER.get(name, name)][1](weight)
    found["build_seconds"] = round(time.monotonic() - begun, 2)
    for m in TOKENS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        row: dict[str, Any] = {"m": m}
        try:
            begun = time.monotonic()
            out = call(x).float()
            torch.cuda.synchronize()
            row["first_call_seconds"] = round(time.monotonic() - begun, 2)
            exact = x.float() @ weight.float().t()
            row["relative_error"] = float((out - exact).norm() / exact.norm())
            calls[m] = functools.partial(call, x)
        except Exception as reason:  # a rival's failure, of whatever kind, is a result
            row["unavailable"] = f"{type(reason).__name__}: {reason}"[:300]
        found["rows"].append(row)
        write_json(path, found)
    return calls


def present(name: str, other_humming: str = "") -> str:
    """Why a rival is not begun; empty if it is."""
    if name in OTHER:
        there = other_humming and Path(other_humming, "humming").is_dir()
        return "" if there else "OTHER_HUMMING names no folder with another version"
    module = RIVALS[name][0]
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def run(context: Context) -> None:
    """Those that are there, at once; then those that want the GPU for themselves."""
    other = os.environ.get("OTHER_HUMMING", "")
    found: dict[str, Any] = {"shape": SHAPE, "seconds_each": LIMIT + TIMING}
    begun: list[str] = []
    for name in [*RIVALS, *OTHER]:
        if reason := present(name, other):
            found[name] = {"unavailable": reason}
        else:
            begun.append(name)
    together = [name for name in begun if name not in ALONE]
    for wave in [together, *([name] for name in begun if name in ALONE)]:
        if context.left() < 6:
            found |= {name: {"unavailable": "no time was left"} for name in wave}
            continue
        for name, entry in in_processes(wave, context.left() - 2, context.out, other).items():
            found[name] = entry
            print(f"{name}: {in_short(entry)}", flush=True)
        context.results.write("rivals", found)
    (context.out / LOCK).unlink(missing_ok=True)
    if not any("us" in row for name in begun for row in found[name].get("rows", [])):
        raise Failed("no rival could be timed, nor our kernels beside them")


def in_processes(names: list[str], seconds: float, out: Path, other: str) -> dict[str, Any]:
    """Name -> what it wrote, its seconds, and the reason if it broke off or was stopped."""
    begun, entries = time.monotonic(), {}
    with contextlib.ExitStack() as files:
        processes = {name: _start(name, out, other, files) for name in names}
        for name, (process, errors) in processes.items():
            reason = ""
            try:
                process.wait(max(0.0, seconds - (time.monotonic() - begun)))
                if process.returncode == -signal.SIGALRM:
                    reason = "stopped, its time was up"
                elif process.returncode:
                    errors.seek(0)
                    last = errors.read().strip().splitlines() or [f"status {process.returncode}"]
                    reason = last[-1][:300]
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                reason = f"stopped after {seconds:.0f} s"
            path = _file(name, out)
            entry = json.loads(path.read_text()) if path.exists() else {}
            path.unlink(missing_ok=True)
            entry["seconds"] = round(time.monotonic() - begun, 1)
            entries[name] = entry | ({"unavailable": reason} if reason else {})
    return entries


def _file(name: str, out: Path) -> Path:
    return out / f".rival-{name}.json"


def _start(
    name: str, out: Path, other: str, files: contextlib.ExitStack
) -> tuple[subprocess.Popen[str], IO[str]]:
    environment = dict(os.environ)
    environment.setdefault("LIBRARY_PATH", STUBS)  # Humming links libcuda
    if name in OTHER:
        environment["PYTHONPATH"] = os.pathsep.join([other, environment.get("PYTHONPATH", "")])
    errors = files.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, __file__, name, str(_file(name, out))],
        env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True,
    )  # fmt: skip
    return process, errors


def in_short(entry: dict[str, Any]) -> str:
    """A rival in a line."""
    parts = [
        f"M={row['m']} {row['us']:.1f} us ({row['relative_error']:.1e})"
        if "us" in row
        else f"M={row['m']} {row['unavailable'][:60]}"
        for row in entry.get("rows", [])
    ]
    return "; ".join([*parts, *([entry["unavailable"][:120]] if "unavailable" in entry else [])])


if __name__ == "__main__":
    measure_one(sys.argv[1], Path(sys.argv[2]))
