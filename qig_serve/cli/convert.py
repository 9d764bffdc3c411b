"""Rewrite InternVL2 as published into the InternVL port of transformers, which can be quantized.

For InternVL2-2B, 8B and 26B (model type internvl_chat with an InternLM2 decoder). Works on names
and shapes: no code of the repository is run. Needs the memory of one 2 GB shard.

examples:
  qig-serve convert InternVL2-8B InternVL2-8B-hf
  qig-serve convert InternVL2-8B InternVL2-8B-hf --quiet --json convert.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qig_serve.cli import add_json, add_model, check_targets, unwind_on_sigterm
from qig_serve.json_output import write_json

HELP = "rewrite InternVL2 as published into a form that can be quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser, "source", "SOURCE", "directory as published")
    parser.add_argument("output", type=Path, metavar="DIR", help="directory to write")
    add_json(parser, "what was done")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    from rich.console import Console

    from qig_serve.evaluation.table import progress_bars
    from qig_serve.offline.source.internvl2 import convert

    check_targets(args.json, read=[args.source])
    unwind_on_sigterm()
    with progress_bars(Console(stderr=True), args.quiet, unit="tensors") as progress:
        convert(args.source, args.output, progress)
    if args.json:
        write_json(args.json, {"source": str(args.source), "output": str(args.output)})
    if not args.quiet:
        print(f"wrote {args.output}")
    return 0
