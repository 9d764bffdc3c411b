"""The demonstration: quantize the bundled model, evaluate it, serve it, ask it about a picture.

examples:
  qig-serve demo --json demo.json            what `make demo` runs
  qig-serve demo questions --split dev --n 200 --output questions
  qig-serve demo train --output model --minutes 65
  qig-serve demo export --model qwen2-vl --without-outliers --output model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qig_serve.cli import add_json, check_targets

HELP = (
    "quantize, evaluate, serve and ask the bundled model; make its questions; train or export one"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s [run|questions|train|export] [options]"
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "questions", "train", "export"),
        default="run",
        help="the whole demonstration (default), its questions as a JSONL with pictures, a "
        "training of its model, or a trained model as a directory",
    )
    run_options = parser.add_argument_group("run")
    add_json(run_options, "the figures")
    run_options.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run_options.add_argument(
        "--workdir",
        type=Path,
        default=Path(".demo"),
        metavar="DIR",
        help="checkpoints and logs (default: .demo)",
    )
    run_options.add_argument(
        "--questions",
        type=int,
        default=2000,
        metavar="N",
        help="held-out questions (default: 2000)",
    )
    run_options.add_argument(
        "--samples", type=int, default=128, metavar="N", help="calibration samples (default: 128)"
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--split",
        default="test",
        metavar="NAME",
        help="train, calibration, dev or test (default: test)",
    )
    questions.add_argument(
        "--n", type=int, default=200, metavar="N", help="how many questions (default: 200)"
    )
    training = parser.add_argument_group("train")
    training.add_argument(
        "--minutes", type=float, default=65.0, metavar="N", help="time budget (default: 65)"
    )
    training.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="processes that share a step (default: 2)",
    )
    training.add_argument(
        "--start-from",
        metavar="DIR",
        help="begin with this model's decoder; `bundled` is the one in this package",
    )
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    export = parser.add_argument_group("export")
    export.add_argument(
        "--without-outliers", action="store_true", help="take the channel outliers out"
    )
    both = parser.add_argument_group("train and export")
    both.add_argument(
        "--model",
        default="llava",
        metavar="NAME",
        help="llava, internvl, qwen2-vl, or, to be trained first, qwen3-vl-moe (default: llava)",
    )
    several = parser.add_argument_group("questions, train and export")
    several.add_argument("--output", type=Path, metavar="DIR", help="where the result goes")
    questions.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration or one of its programs."""
    from qig_serve.errors import UserError

    if args.action == "run":
        from qig_serve.demo.questions import samples
        from qig_serve.demo.run import run_demo

        samples("test", args.questions)  # wrong ones fail now
        samples("calibration", args.samples)
        if args.json is not None:
            args.json.absolute().parent.mkdir(parents=True, exist_ok=True)
        check_targets(args.json)
        run_demo(args.workdir, args.json, args.questions, args.samples, args.quiet)
        return 0
    if args.output is None:
        raise UserError(f"demo {args.action} needs --output DIR")
    if args.action == "questions":
        from qig_serve.demo.questions import write_jsonl

        print(write_jsonl(args.split, args.n, args.output, args.seed))
        return 0
    if args.action == "export":
        from qig_serve.demo.bundled import export_bundled

        print(export_bundled(args.model, args.output, outliers=not args.without_outliers))
        return 0

    from qig_serve.demo.train import train

    folder = train(
        args.output,
        minutes=args.minutes,
        processes=args.processes,
        resume=args.resume,
        model=args.model,
        start_from=args.start_from,
    )
    print(f"model written to {folder}")
    return 0
