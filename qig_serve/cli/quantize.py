"""Quantize a vision-language model and write a checkpoint that vLLM serves.

examples:
  qig-serve quantize MODEL --scheme w3a16 --calib calibration.jsonl --output DIR
  qig-serve quantize MODEL --recipe paper-w4a8 --calib demo --output DIR
  qig-serve quantize MODEL --scheme w4a8 --method awq --calib data.jsonl --print-recipe

Several GPUs share the samples of one run (first line), and so do several machines (second line, on
each of K machines, R being 0 to K-1; all have the model and samples, and machine 0 writes):
  torchrun --nproc-per-node N -m qig_serve quantize MODEL --calib calibration.jsonl --output DIR
  torchrun --nnodes K --node-rank R --master-addr HOST --nproc-per-node N -m qig_serve quantize ...

Every option under "recipe" is a field of the recipe: a recipe file holds the same names, with _
for -. Values on the command line win over the file, and both over the defaults of the method;
--print-recipe prints the recipe that results.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from qig_serve.cli import add_json, add_model, check_targets, unwind_on_sigterm
from qig_serve.json_output import write_json

HELP = "quantize a model with QIG, or with one of the methods it is compared with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from qig_serve.offline.recipe import METHODS, PRESETS, QuantRecipe

    parser.usage = "%(prog)s MODEL --calib SRC --output DIR [options]"
    add_model(parser, "model", "MODEL", "directory of a Hugging Face model")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="checkpoint to write; must not exist yet"
    )
    parser.add_argument("--resume", action="store_true", help="go on after an interrupted run")
    add_json(parser, "the figures")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the recipe as YAML, and do nothing else"
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help=f"a YAML file, or one of {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--evaluate",
        metavar="SRC",
        help="compare the answers with full precision afterwards, on a JSONL of questions or "
        "'demo', and put the table into the report and the model card",
    )
    parser.add_argument(
        "--evaluate-n", type=int, metavar="N", help="evaluate on the first N questions"
    )
    fields = parser.add_argument_group("recipe")
    usual = QuantRecipe()
    of_method = {name for values in METHODS.values() for name in values}
    for name, field in QuantRecipe.model_fields.items():
        flag = "--" + name.replace("_", "-")
        value, text = getattr(usual, name), (field.description or "").replace("%", "%%")
        if value is not None and "(default" not in text:
            its = f"the method's; {usual.method} has {value}" if name in of_method else value
            text += f" (default: {its})"
        options: dict[str, Any] = {"dest": f"recipe_{name}", "default": argparse.SUPPRESS}
        if field.annotation in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(name, field.annotation)
        fields.add_argument(flag, help=text, **options)


def _metavar(name: str, annotation: Any) -> str:
    """What stands for a field's value: the choices, or what kind of value it is."""
    from qig_serve.formats import SCHEMES

    if name == "scheme":
        return "{" + ",".join(s.name for s in SCHEMES.values() if s.servable) + "}"
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    named = {"calib": "SRC", "image_folder": "DIR"}
    return named.get(name) or ("N" if annotation is int else name.upper())


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's explicit fields: of the file or preset, then of the command line."""
    from qig_serve.offline.recipe import load_recipe

    values = load_recipe(args.recipe) if args.recipe else {}
    given = {k.removeprefix("recipe_"): v for k, v in vars(args).items() if k[:7] == "recipe_"}
    return {**values, **given}


def run(args: argparse.Namespace) -> int:
    """Run the command. Of several processes only the first one prints, but for what went wrong:
    that the first one of each machine does."""
    from qig_serve.errors import UserError

    try:
        status = _run(args)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2
        raise
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # At exit torch's threads now and then end a finished process with "terminate called
        # without an active exception" (once in five runs), and torchrun calls the run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(args: argparse.Namespace) -> int:
    from qig_serve.errors import UserError
    from qig_serve.offline.recipe import make_recipe

    recipe = make_recipe(recipe_values(args), args.recipe or "recipe")
    if args.print_recipe:
        print(recipe.to_yaml(), end="")
        return 0
    if args.output is None:
        raise UserError("say where the checkpoint goes: --output DIR")

    sources = (args.model, args.recipe, recipe.calib, recipe.image_folder, args.evaluate)
    check_targets(args.json, read=sources)
    if args.json is not None and args.json.absolute() == args.output.absolute():
        raise UserError(f"--json and --output are both {args.json}: give two names")
    if args.evaluate_n is not None and not args.evaluate:
        raise UserError("--evaluate-n is for --evaluate SRC: leave it out, or name the questions")
    if args.evaluate and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--evaluate works in one process: run `qig-serve evaluate` afterwards")

    from qig_serve.evaluate import load_samples
    from qig_serve.offline.checkpoint.writer import partial_directory
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.report.card import calibration_figures

    if args.evaluate and recipe.format != "qig":
        raise UserError(
            f"--evaluate cannot read the form {recipe.format}: evaluate a checkpoint of the form "
            "qig, whose numbers are the same"
        )
    # Read before the work begins: a mistyped file must not cost a run.
    questions = load_samples(args.evaluate, args.evaluate_n) if args.evaluate else []
    unwind_on_sigterm()
    try:
        report = quantize(args.model, args.output, recipe, resume=args.resume, quiet=args.quiet)
    except (KeyboardInterrupt, SystemExit):
        if partial_directory(args.output).exists():
            print("the finished blocks are kept: go on with --resume", file=sys.stderr)
        raise
    results = _evaluate(args, questions) if questions else None
    if os.environ.get("RANK", "0") != "0":
        return 0
    if not questions and not args.quiet:
        print("no evaluation was run (--evaluate SRC); on the calibration samples:")
        print("\n".join(calibration_figures(report)))
    if not args.quiet:
        server = "qig-serve" if recipe.format == "qig" else "vllm"
        print(f"serve it: {server} serve {args.output}", file=sys.stderr)
    if args.json:
        record = report.model_dump(mode="json", exclude={"blocks", "recipe"})
        record |= {"output": str(args.output), "summary": report.summary(), "evaluation": results}
        write_json(args.json, record)
    return 0


def _evaluate(args: argparse.Namespace, questions: list[Any]) -> dict[str, Any]:
    """Puts the comparison with full precision into the checkpoint's report and card.

    Returns it: "fp" and "quantized" -> EvaluationResult.to_json.
    """
    from rich.console import Console

    from qig_serve.evaluate import evaluate_many
    from qig_serve.evaluation.table import print_whole, progress_bars, results_table
    from qig_serve.offline.report.write import add_evaluation

    console = Console(stderr=True, quiet=args.quiet)
    with progress_bars(console, args.quiet) as progress:
        results = evaluate_many(
            [("quantized", args.output)], args.model, questions, progress=progress
        )
    records = {name: result.to_json() for name, result in results.items()}
    add_evaluation(args.output, {"data": args.evaluate, "results": records})
    if not args.quiet:
        print_whole(Console(), results_table(results))
    return records
