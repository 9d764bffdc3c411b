"""`make gpu`: cross-compile, check, tune and time the kernels on the GPU at hand.

    python tests/benchmarks/gpu_kernels.py [--skip-tests] [--skip-tuning] [--quick] [--out DIR]

In order: every kernel is cross-compiled for this machine's Triton (needs no GPU); the tests with
marker gpu; compute-sanitizer on small shapes, where it is installed; tiles are tuned; then each
layer shape is timed at each number of tokens, CUDA-graphed, with a cold L2 and random data, beside
cuBLAS bf16, torch._int_mm and whichever of Humming, GemLite, Marlin, Machete and CUTLASS int8 can
be imported. Fractions are of the copy bandwidth and bf16 rate measured here, first. Writes
kernels-<card>.json and .png under tests/benchmarks/results/. Without a CUDA device it stops after
the first step, in one sentence, with status 1.

Nothing is assumed of the rivals: what could not be imported or run is named in the JSON with the
reason, each result is compared with ours, and the names of the kernels that ran are recorded.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

from qig_serve.formats import get_scheme
from qig_serve.kernels import compile_report, layout, ops, tuning

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_TOKENS = (1, 16, 512)
GROUP = 128

Rival = Callable[[], torch.Tensor]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "vllm", "humming-kernels", "gemlite"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit measured, "+" if the tree differs; None outside a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "kernels"], cwd=ROOT)
    return head + ("+" if changed.returncode else "")


def cross_compile(target: int | None) -> list[str]:
    """Problems of the tuned kernels under this Triton, for this GPU or, without one, Hopper."""
    known = [t for t in compile_report.TARGETS if target is None or t <= target]
    problems = []
    for compiled in compile_report.report([90 if target is None else max(known)]):
        print(compile_report.row(compiled), flush=True)
        problems += compiled.problems()
    return problems


def limits() -> dict[str, float]:
    """Copy bandwidth, bytes a second, and bf16 rate, operations a second, as measured."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_(0, 127)
    target = torch.empty_like(source)
    copy = tuning.time_microseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = tuning.time_microseconds(lambda: a @ b)
    return {
        "copy_bytes_per_second": 2 * source.numel() / copy * 1e6,
        "bf16_flops": 2 * 8192**3 / product * 1e6,
    }


def floor_microseconds(scheme: str, m: int, n: int, k: int, limit: dict[str, float]) -> float:
    """The larger of moving every byte once and doing every operation, at the measured limits.

    int8 tensor cores are counted at twice the bf16 rate.
    """
    weight = {"w3a16": n * k * 3 / 8 + n * k / GROUP * 3, "w4a8": n * k / 2 + 4 * n}[scheme]
    moved = weight + 2 * m * (k + n)
    rate = limit["bf16_flops"] * (2 if scheme == "w4a8" else 1)
    return max(moved / limit["copy_bytes_per_second"], 2 * m * n * k / rate) * 1e6


def kernels_of(run: Callable[[], object]) -> list[str]:
    """Names of the GPU kernels of a call, longest first."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_time_total > 0]
    return [e.key[:120] for e in sorted(events, key=lambda e: -e.device_time_total)]


# ---- rivals: (weight fp [N, K], x [M, K]) -> a call; whatever they raise is reported


def humming(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """Humming at the same bits: 3-bit groups of 128, or int4 with int8 activations."""
    from humming.layer import HummingLayer

    arguments: dict[str, Any] = dict(
        shape_n=weight.shape[0], shape_k=weight.shape[1], torch_dtype=x.dtype
    )
    if scheme == "w3a16":
        config = dict(b_dtype="uint3", weight_scale_group_size=GROUP)
    else:
        config = dict(a_dtype="int8", b_dtype="int4")
    layer = HummingLayer(**arguments, **config).cuda()
    layer.load_from_unquantized(weight.to(x.dtype))
    layer.transform()
    return lambda: layer(x)


def gemlite(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """GemLite's int4 weights with dynamically quantized int8 activations."""
    if scheme != "w4a8":
        raise NotImplementedError("GemLite packs 1, 2, 4 and 8 bits, not 3")
    from gemlite.core import DType, GemLiteLinear

    n, k = weight.shape
    scale = weight.abs().amax(1, keepdim=True) / 7
    codes = (weight / scale).round().clamp(-7, 7).to(torch.int8) + 8
    layer = GemLiteLinear(
        4, group_size=k, in_features=k, out_features=n, input_dtype=DType.INT8,
        output_dtype=DType.BF16, scaled_activations=True,
    )  # fmt: skip
    layer.pack(codes.to(torch.uint8), scale, 8, None)
    return lambda: layer(x)


def marlin(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """vLLM's Marlin W4A16, groups of 128: one bit more than w3a16, and the usual alternative."""
    if scheme != "w3a16":
        raise NotImplementedError("W4A16, compared with w3a16")
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    _, packed, scale, g_idx, sort, _ = marlin_utils_test.marlin_quantize(
        weight.t().contiguous().to(x.dtype), kind, GROUP, False
    )
    n, k = weight.shape
    zero = marlin_utils.marlin_make_empty_g_idx(x.device)
    workspace = marlin_utils.marlin_make_workspace_new(x.device)
    return lambda: marlin_utils.apply_gptq_marlin_linear(
        x, packed, scale, zero, g_idx, sort, workspace, kind, n, k, True
    )


def machete(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """vLLM's Machete W4A16 (Hopper)."""
    if scheme != "w3a16":
        raise NotImplementedError("W4A16, compared with w3a16")
    from vllm import _custom_ops as custom
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        pack_rows,
        quantize_weights,
    )
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    _, codes, scale, _ = quantize_weights(weight.t().contiguous().to(x.dtype), kind, GROUP)
    packed = pack_rows(codes, kind.size_bits, *codes.shape).t().contiguous().t()
    ready = custom.machete_prepack_B(packed, x.dtype, kind, scale.dtype)
    return lambda: custom.machete_mm(
        x, ready, kind, b_group_scales=scale, b_group_size=GROUP, out_type=x.dtype
    )


def cutlass_int8(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """vLLM's CUTLASS W8A8 with its own dynamic activation quantization."""
    if scheme != "w4a8":
        raise NotImplementedError("W8A8, compared with w4a8")
    from vllm import _custom_ops as custom

    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8).t()

    def call() -> torch.Tensor:
        quantized, token_scale, _ = custom.scaled_int8_quant(x)
        return custom.cutlass_scaled_mm(quantized, codes, token_scale, scale, x.dtype)

    return call


def int_mm(scheme: str, weight: torch.Tensor, x: torch.Tensor) -> Rival:
    """torch._int_mm, 8-bit weights, without quantizing or rescaling: the product alone."""
    if scheme != "w4a8":
        raise NotImplementedError("int8, compared with w4a8")
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8).t()
    quantized = ops.quantize_activation.quantize(x)[0]
    return lambda: torch._int_mm(quantized, codes)


RIVALS: dict[str, Callable[[str, torch.Tensor, torch.Tensor], Rival]] = {
    "humming": humming,
    "gemlite": gemlite,
    "marlin_w4a16": marlin,
    "machete_w4a16": machete,
    "cutlass_w8a8": cutlass_int8,
    "torch_int_mm": int_mm,
}
WITHOUT_RESCALING = ("torch_int_mm",)


def time_rivals(
    scheme: str, weight: torch.Tensor, x: torch.Tensor, names: bool
) -> dict[str, dict[str, Any]]:
    """Rival -> microseconds, relative error against fp32 and kernels, or why there are none."""
    expected = x.float() @ weight.float().t()
    results: dict[str, dict[str, Any]] = {}
    for name, build in RIVALS.items():
        try:
            call = build(scheme, weight, x)
            out = call()
            torch.cuda.synchronize()
            entry: dict[str, Any] = {"us": tuning.time_microseconds(call)}
            if name not in WITHOUT_RESCALING:
                error = (out.float() - expected).norm() / expected.norm()
                entry["relative_error"] = float(error)
            if names:
                entry["kernels"] = kernels_of(call)
        except Exception as reason:  # a rival's failure, of whatever kind, is a result
            entry = {"unavailable": f"{type(reason).__name__}: {reason}"[:300]}
        results[name] = entry
    return results


def measure(
    scheme_name: str, n: int, k: int, tokens: tuple[int, ...], limit: dict[str, float]
) -> list[dict[str, Any]]:
    """A row a number of tokens."""
    scheme = get_scheme(scheme_name)
    device = torch.device("cuda", torch.cuda.current_device())
    prepared = tuning.random_linear(scheme, n, k, torch.bfloat16, device)
    if scheme_name == "w3a16":
        weight = ops.w3a16.dequantize(
            prepared["weight_lanes"], prepared["scale_zero"], n, torch.bfloat16
        )
    else:
        codes, scale = layout.unpack_w4a8(prepared["weight_nibbles"], prepared["channel_scale"], n)
        weight = (codes.float() * scale).to(torch.bfloat16)
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            return ops.linear(scheme, x, prepared, n, k, None)

        def cublas(x: torch.Tensor = x) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        expected = x.float() @ weight.float().t()
        error = float((ours().float() - expected).norm() / expected.norm())
        rivals = time_rivals(scheme_name, weight, x, names=m in (1, 2048))
        kernels = kernels_of(ours)
        if not any("w3a16" in name or "w4a8" in name for name in kernels):
            raise RuntimeError(f"{scheme_name} {n}x{k} M={m} ran {kernels}, not our kernel")
        row = figures(
            tuning.time_microseconds(ours),
            tuning.time_microseconds(cublas),
            floor_microseconds(scheme_name, m, n, k, limit),
            rivals,
        )
        tile = tuning.select(scheme, ops._architecture(device), n, k, m)
        rows.append({"m": m, **row, "relative_error": error, "kernels": kernels, "tile": str(tile)})
        print(
            f"{scheme_name} {n}x{k} M={m}: {row['us']:.1f} us, {row['fraction_of_limit']:.0%} of "
            f"the limit, {row['speedup_over_cublas']:.2f}x cuBLAS bf16",
            flush=True,
        )
    return rows


def figures(
    us: float, cublas_us: float, limit_us: float, rivals: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is reported of one linear at one number of tokens, from the times."""
    best = min((entry["us"] for entry in rivals.values() if "us" in entry), default=None)
    return {
        "us": us,
        "cublas_bf16_us": cublas_us,
        "limit_us": limit_us,
        "fraction_of_limit": limit_us / us,
        "speedup_over_cublas": cublas_us / us,
        "speedup_over_best_rival": best / us if best else None,
        "rivals": rivals,
    }


def write(result: dict[str, Any], folder: Path) -> Path:
    """kernels-<card>.json and .png in the folder; the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{result['card'].replace(' ', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    return path


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up over cuBLAS bf16 and fraction of the limit, against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for column, scheme in enumerate(("w3a16", "w4a8")):
        for entry in result["linears"]:
            if entry["scheme"] != scheme:
                continue
            tokens = [row["m"] for row in entry["rows"]]
            label = f"{entry['layer']} {entry['n']}x{entry['k']}"
            for line, key in enumerate(("speedup_over_cublas", "fraction_of_limit")):
                axes[line][column].plot(
                    tokens, [row[key] for row in entry["rows"]], marker="o", label=label
                )
        axes[0][column].axhline(1, color="grey", linewidth=0.8)
        axes[0][column].set(title=f"{scheme}: speed-up over cuBLAS bf16", xscale="log")
        axes[1][column].set(title="fraction of the measured limit", xlabel="tokens", ylim=(0, 1.05))
        axes[1][column].legend(fontsize=7)
    figure.suptitle(f"{result['card']}, {result['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-tuning", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two shapes, three numbers of tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    target = None
    if has_gpu:
        major, minor = torch.cuda.get_device_capability()
        target = 10 * major + minor
    print(f"cross-compiling with Triton {triton.__version__}", flush=True)
    problems = cross_compile(target)
    print("\n".join(problems) or "no threshold passed", flush=True)
    if not has_gpu:
        print("everything compiles, but no CUDA device was found to run it on", file=sys.stderr)
        return 1

    if not options.skip_tests:
        checks = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
        if subprocess.run(checks, cwd=ROOT).returncode:
            print("the gpu tests failed: nothing is timed", file=sys.stderr)
            return 1
        if sanitizer := shutil.which("compute-sanitizer"):
            small = [*checks[1:], "-k", "every_kind_of_tile or quantize"]
            command = [sanitizer, "--error-exitcode", "9", sys.executable, *small]
            if subprocess.run(command, cwd=ROOT).returncode:
                print("compute-sanitizer found errors: nothing is timed", file=sys.stderr)
                return 1
        else:
            print("compute-sanitizer is not installed: skipped", flush=True)
    if not options.skip_tuning and tuning.main(["--quick"] if options.quick else []):
        return 1

    limit = limits()
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(), "commit": commit(), "limits": limit,
        "compile_problems": problems, "sanitizer": shutil.which("compute-sanitizer") is not None,
        "linears": [],
    }  # fmt: skip
    for model, layers in tuning.LAYER_SHAPES.items():
        for layer, (n, k) in list(layers.items())[: 1 if options.quick else None]:
            for scheme in ("w3a16", "w4a8"):
                tokens = QUICK_TOKENS if options.quick else TOKENS
                rows = measure(scheme, n, k, tokens, limit)
                result["linears"].append(
                    dict(model=model, layer=layer, scheme=scheme, n=n, k=k, rows=rows)
                )
    print(f"wrote {write(result, options.out)} and the plot beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
