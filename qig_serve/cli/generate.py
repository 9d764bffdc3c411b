"""Answer a batch of requests without a server, through vLLM.

    qig-serve generate DIR -i batch.jsonl -o out.jsonl [any flag of `vllm serve`]
    qig-serve generate DIR -i pictures/ --prompt "What is this?" -o out.csv

The input is OpenAI's batch JSONL, a CSV file with columns image, prompt and perhaps custom_id, or
a folder of pictures with --prompt. Image paths are relative to the input; pictures are read when
their request is sent. Rows are written in the order in which answers come. A line or picture that
is wrong becomes an error row that names it. Exit status 1 if a row is an error. The engine is not
started if no request can be sent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qig_serve.cli import add_json, add_model, check_targets, expand_home, utf8
from qig_serve.json_output import write_json

HELP = "answer a batch of requests (OpenAI JSONL, CSV, or a folder of pictures)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, which may stand before or after DIR; what is not ours is vLLM's."""
    _add_options(parser)
    add_model(parser, "directory", "DIR", "written by qig-serve quantize")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="...", help="flags of vllm serve"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-i",
        "--input",
        type=Path,
        metavar="PATH",
        help="required: .jsonl, .csv or a folder of pictures",
    )
    add("-o", "--output", type=Path, metavar="FILE", help="required: .jsonl or .csv")
    question = "question about every picture of a folder, or of a CSV file without a column prompt"
    add("--prompt", type=utf8, help=question)
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer, in tokens, to requests that do not set it (default: vLLM's)",
    )
    add("--resume", action="store_true", help="skip requests whose answer is in the output file")
    add_json(parser, "counts, tokens and seconds")
    add("--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> int:
    """Run the batch."""
    import dataclasses
    import os

    from qig_serve.batch import EngineDied, generate
    from qig_serve.errors import UserError

    after = argparse.ArgumentParser(prog="qig-serve generate", add_help=False, allow_abbrev=False)
    _add_options(after)
    after.set_defaults(**{k: v for k, v in vars(args).items() if v is not None})
    args, flags = after.parse_known_args(args.flags)
    expand_home(args)
    if args.input is None or args.output is None:
        raise UserError("say what to read with -i and where to write with -o")
    check_targets(args.json, args.output)
    check_targets(args.json, read=(args.directory, args.input))
    # Its lines are no result.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if args.quiet:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    try:
        totals = generate(
            args.directory,
            args.input,
            args.output,
            prompt=args.prompt,
            max_tokens=args.max_tokens,
            resume=args.resume,
            flags=flags,
            quiet=args.quiet,
            give_way=True,
        )
    except EngineDied as died:
        print(
            f"qig-serve generate: {died}; the rows in {args.output} are good: "
            "run it again with --resume",
            file=sys.stderr,
        )
        return 1
    if args.json:
        write_json(args.json, dataclasses.asdict(totals))
    if not args.quiet or totals.failed:
        print(
            f"{args.output}: {totals.done} rows written, {totals.failed} of them errors, "
            f"{totals.skipped} were there already",
            file=sys.stderr,
        )
        for said in totals.first_errors:
            print(f"- {said}", file=sys.stderr)
        if totals.failed > len(totals.first_errors):
            print("- and more, all in that file", file=sys.stderr)
        if not totals.seconds:
            print("no request was left to send, so the engine was not started", file=sys.stderr)
    return 1 if totals.failed else 0
