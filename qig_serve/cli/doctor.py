"""Say whether and how this machine serves a checkpoint, or why not.

Reads the checkpoint's headers and asks vLLM for its platform; loads no weights. Exit status 1 if
it cannot be served here.

examples:
  qig-serve doctor DIR
  qig-serve doctor DIR --tensor-parallel-size 2 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_SHOWN = 3  # problems; usually the same one in every layer

HELP = "how this machine would serve a checkpoint: kernels, sizes, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="written by qig-serve quantize")
    add("--dtype", default="auto", help="as for serve; default %(default)s")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="default %(default)s")
    add("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from qig_serve.serving.describe import describe, model_dtype, read_manifest

    read_manifest(args.directory)

    import vllm

    from qig_serve.vllm_plugin import SUPPORTED_VLLM, check_vllm_version

    problems = []
    try:
        check_vllm_version(vllm.__version__)
    except RuntimeError as error:
        problems.append(str(error))
    dtype = model_dtype(args.directory, args.dtype)
    report = describe(args.directory, dtype, args.tensor_parallel_size)
    problems += report.problems
    sizes = ", ".join(map(str, report.tensor_parallel_sizes)) or "none"
    if args.tensor_parallel_size not in report.tensor_parallel_sizes:
        problems.append(
            f"tensor parallel size {args.tensor_parallel_size} does not fit (these do: {sizes})"
        )
    if args.json:
        details = report.as_json() | {"vllm": vllm.__version__, "problems": problems}
        print(json.dumps(details, indent=2))
        return 1 if problems else 0

    mib = 1 << 20
    rows = [
        ("checkpoint", f"{report.manifest.scheme}, quantized with {report.manifest.method}"),
        ("device", f"{report.device}, computing in {str(dtype).removeprefix('torch.')}"),
        ("vLLM", f"{vllm.__version__} (supported: {SUPPORTED_VLLM})"),
        ("tensor parallel", sizes),
        (
            "weights",
            f"{report.quantized_bytes / mib:.1f} MiB in {len(report.layers)} quantized layers, "
            f"{report.other_bytes / mib:.1f} MiB in 16 bits",
        ),
    ]
    if report.kv_bytes_per_token is not None:
        rows.append(("KV cache", f"{report.kv_bytes_per_token / 1024:g} KiB a token"))
    rows += [("kernel", f"{name}: {count} layers") for name, count in report.kernels.items()]
    rows += [("cannot be served", problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        rows.append(("", f"and {len(problems) - _SHOWN} more (--json lists them)"))
    for name, text in rows:
        print(f"{name:16}  {text}")
    return 1 if problems else 0
