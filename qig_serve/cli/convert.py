"""Rewrite InternVL2 as published into the InternVL port of transformers, which can be quantized.

For InternVL2-2B, 8B and 26B (model type internvl_chat with an InternLM2 decoder). Works on names
and shapes: no code of the repository is run. Needs the memory of one 2 GB shard.

examples:
  qig-serve convert InternVL2-8B InternVL2-8B-hf
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rewrite InternVL2 as published into a form that can be quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory as published")
    parser.add_argument("output", type=Path, metavar="DIR", help="directory to write")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    from qig_serve.offline.convert import convert

    convert(args.source, args.output)
    print(f"wrote {args.output}")
    return 0
