"""Say whether and how this machine serves a checkpoint, or why not.

Reads the checkpoint's headers and asks vLLM for its platform. Then loads the checkpoint in
transformers, one block at a time, and compares its output for a picture and a question with what
was recorded when it was written. Exit status 1 if it cannot be served here, or the output differs.

examples:
  qig-serve doctor DIR
  qig-serve doctor DIR --no-load             # headers only
  qig-serve doctor DIR --tensor-parallel-size 2 --json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qig_serve.cli import add_json, add_model, check_targets
from qig_serve.errors import UserError
from qig_serve.json_output import write_json

HELP = "how this machine would serve a checkpoint: kernels, sizes, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model(parser, "directory", "DIR", "written by qig-serve quantize")
    add("--dtype", default="auto", help="of activations, as for serve; default %(default)s")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="default %(default)s")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help="default %(default)s")
    add("--no-load", action="store_true", help="read the headers only, and compare no output")
    add_json(parser, "everything")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from qig_serve.model_directory import check_texts, read_manifest
    from qig_serve.serving.describe import describe, serving_dtype
    from qig_serve.serving.folders import check_folders

    check_targets(args.json, read=[args.directory])
    if min(args.tensor_parallel_size, args.pipeline_parallel_size) < 1:
        raise UserError("--tensor-parallel-size and --pipeline-parallel-size must be at least 1")
    read_manifest(args.directory)
    check_texts(args.directory)
    check_folders(cuda=False)  # before vLLM is imported, which writes to some of them
    dtype = serving_dtype(args.directory, args.dtype)
    report = describe(args.directory, dtype, args.tensor_parallel_size, args.pipeline_parallel_size)
    sound, answers = (True, "not compared (--no-load)") if args.no_load else _load(args.directory)
    if args.json:
        record = report.as_json() | {"loaded": {"sound": sound, "found": answers}}
        write_json(args.json, record)
    print("\n".join([*report.lines(), f"{'loaded':16}  {answers}"]))
    return 1 if report.problems or not sound else 0


def _load(directory: Path) -> tuple[bool, str]:
    """Whether the checkpoint gives what it gave when it was written, and the sentence for it."""
    from qig_serve.offline.checkpoint.canary import RECORD_FILE, compare_with_record

    try:
        error = compare_with_record(directory)
    except UserError as fault:
        return False, f"WRONG  {fault}"
    if error is None:
        why = "an earlier version wrote it, or the model takes no picture of a usual size"
        return True, f"not compared: there is no {RECORD_FILE}, as {why}"
    same = "exactly" if error < 1e-5 else f"within {error:.2%} of"
    return True, f"gives {same} what it gave when it was written"
