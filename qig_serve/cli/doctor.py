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

HELP = "how this machine would serve a checkpoint: kernels, sizes, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="written by qig-serve quantize")
    add("--dtype", default="auto", help="as for serve; default %(default)s")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="default %(default)s")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help="default %(default)s")
    add("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from qig_serve.model_directory import read_manifest
    from qig_serve.serving.describe import describe, serving_dtype

    read_manifest(args.directory)
    dtype = serving_dtype(args.directory, args.dtype)
    report = describe(args.directory, dtype, args.tensor_parallel_size, args.pipeline_parallel_size)
    print(json.dumps(report.as_json(), indent=2) if args.json else "\n".join(report.lines()))
    return 1 if report.problems else 0
