"""Compare a model's answers with full precision on held-out questions.

Exact match overall and by question type, with right -> wrong and wrong -> right counts and exact
McNemar p; KL, top-1 agreement and perplexity ratio on the wanted answers; empty and repeating
answers. Answers are greedy. An answer counts when the whole of it is the wanted one after Unicode
NFC, case folding and collapsing white space; punctuation counts.

examples:
  qig-serve evaluate my-w3a16 --reference my-model --data questions.jsonl --json result.json
  qig-serve evaluate my-w3a16 --reference my-model --data demo --n 500
  qig-serve evaluate --server http://gpu-box:8000 --data questions.jsonl --json full.json
  qig-serve evaluate my-w3a16 --reference full.json --data questions.jsonl
"""

from __future__ import annotations

import argparse

from qig_serve.cli import add_json, add_model, check_targets, utf8
from qig_serve.errors import UserError
from qig_serve.json_output import write_json

HELP = "compare a model's answers with full precision on held-out questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser, "model", "DIR", "model to evaluate", nargs="?")
    reference = (
        "a file that an earlier --json wrote on the same questions, or the full-precision model"
    )
    add_model(parser, "--reference", "MODEL", reference)
    parser.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help="JSONL of samples with answers, or 'demo' for the demonstration set's test split "
        "('demo:dev' for another)",
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help="use the first N questions (default: all; of demo 2000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of demo's questions (default: 0)"
    )
    parser.add_argument(
        "--kl-samples",
        type=int,
        default=500,
        metavar="N",
        help="questions for KL; 0: none (default: 500)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=160,
        metavar="N",
        help="longest answer generated, in tokens (default: 160)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="what generates the answers; auto: vLLM where it is installed",
    )
    parser.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server instead of loading DIR"
    )
    parser.add_argument(
        "--server-model",
        type=utf8,
        metavar="NAME",
        help="the model's name there (default: the first)",
    )
    add_json(parser, "figures and answers")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def run(args: argparse.Namespace) -> int:
    """Evaluate; exit status 1 when requests to a server failed."""
    if (args.model is None) == (args.server is None):
        raise UserError("give a model directory, or --server URL without one")
    if args.server is None and args.server_model is not None:
        raise UserError("--server-model is for --server: leave it out")
    if args.server is not None and args.engine != "auto":
        raise UserError("--engine is for a model directory, and a server has its own: leave it out")
    if args.seed and args.data.partition(":")[0] != "demo":
        raise UserError("--seed draws questions of 'demo', and a file has its own: leave it out")
    check_targets(args.json, read=(args.model, args.reference, args.data))
    if args.kl_samples < 0 or not 1 <= args.max_tokens < 1 << 31:
        raise UserError("--kl-samples must be at least 0, --max-tokens at least 1 and below 2^31")

    from rich.console import Console

    from qig_serve.evaluate import (
        REFERENCE,
        evaluate_many,
        evaluate_server,
        load_samples,
    )
    from qig_serve.evaluation.table import print_whole, progress_bars, results_table
    from qig_serve.model_directory import model_name

    samples = load_samples(args.data, args.n, args.seed)
    out, messages = Console(), Console(stderr=True)
    if not args.quiet:
        pictures = sum(len(s.images) for s in samples)
        messages.print(f"read {len(samples)} samples with {pictures} images", highlight=False)
    with progress_bars(messages, args.quiet) as progress:
        if args.server is not None:
            result = evaluate_server(
                args.server,
                args.reference,
                samples,
                max_tokens=args.max_tokens,
                progress=progress,
                model=args.server_model,
            )
            results = {result.name: result}
        else:
            name = model_name(args.model)
            name = "model" if name == REFERENCE else name
            results = evaluate_many(
                [(name, args.model)],
                args.reference,
                samples,
                engine=args.engine,
                kl_samples=args.kl_samples,
                max_tokens=args.max_tokens,
                progress=progress,
            )
            result = results[name]
    if args.json:
        record = result.to_json(answers=True)
        if REFERENCE in results:
            record["reference"] = results[REFERENCE].to_json(answers=True)
        write_json(args.json, record)
    if not args.quiet:
        print_whole(out, results_table(results))
    if result.calibration_overlap:
        messages.print(
            f"warning: {len(result.calibration_overlap)} of these questions were in the "
            "calibration set: the figures are flattered",
            highlight=False,
        )
    for failure in result.failures[:5]:
        messages.print(f"failed request: {failure}", highlight=False, markup=False)
    if result.failures:
        messages.print(
            f"{len(result.failures)} of {len(samples)} requests failed and are not scored",
            highlight=False,
        )
        return 1
    return 0
