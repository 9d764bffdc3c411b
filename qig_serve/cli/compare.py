"""Quantize with several methods, schemes and seeds, and compare the results in one run.

Tables: exact match with McNemar's test against full precision, KL to full precision with the error
of the states that the output head reads (which tells close methods apart on fewer questions), time
and peak memory, exact match by question type, and McNemar's test between methods; --json has more.
All models, full precision too, answer through transformers, so that nothing but the weights
differs; greedy answers are found by teacher forcing unless --engine says otherwise. w2a16 and
w2a16-channel are stress schemes, for comparing methods where the served schemes are too mild; no
server loads them.

examples:
  qig-serve compare MODEL --schemes w3a16,w4a8 --methods rtn,awq,mbq,gptq,qig,qig+ --seeds 3 \\
      --calib demo --data demo --json compare.json --plot compare.png
  qig-serve compare MODEL --schemes w2a16 --methods qig,qig:token_weights=uniform \\
      --calib calibration.jsonl --data questions.jsonl

A method may carry recipe fields, as NAME:FIELD=VALUE:FIELD=VALUE, for ablations.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qig_serve.cli import add_json, add_model, check_targets, unwind_on_sigterm
from qig_serve.errors import UserError
from qig_serve.extras import require
from qig_serve.json_output import write_json

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.console import Console

    from qig_serve.evaluation.comparison import Run
    from qig_serve.offline.recipe import QuantRecipe
    from qig_serve.samples import Sample

HELP = "quantize by several methods and compare the results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s MODEL --calib SRC --data SRC [options]"
    add_model(parser, "model", "MODEL", "full-precision model directory")
    parser.add_argument(
        "--schemes", default="w3a16,w4a8", metavar="A,B,...", help="schemes (default: %(default)s)"
    )
    parser.add_argument(
        "--methods",
        default="rtn,gptq,qig,qig+",
        metavar="A,B,...",
        help="methods, as in `quantize --method` (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="repeat with N seeds; default 1"
    )
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        metavar="N",
        help="the first of them, to add to an earlier comparison; default 0",
    )
    parser.add_argument(
        "--calib", required=True, metavar="SRC", help="calibration samples, as for quantize"
    )
    parser.add_argument(
        "--text-only", action="store_true", help="allow calibration samples without images"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=128,
        metavar="N",
        help="calibration samples per seed; default 128",
    )
    parser.add_argument(
        "--data", required=True, metavar="SRC", help="questions: JSONL, or demo, or demo:dev"
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help="use the first N questions (default: all; of demo 2000)"
    )
    parser.add_argument(
        "--kl-samples", type=int, default=500, metavar="N", help="questions for KL; default 500"
    )
    parser.add_argument(
        "--engine",
        choices=("forced", "transformers", "vllm", "none"),
        default="forced",
        help="how answers are found: by teacher forcing (default; the same exact match and "
        "agreement in a tenth of the time), or by generation; none: KL alone",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=160,
        metavar="N",
        help="longest answer in tokens; default 160",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the checkpoints here (default: deleted)"
    )
    add_json(parser, "all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (.png, .svg, .pdf)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def make_recipes(
    schemes: str, methods: str, calib: str, samples: int, seed: int, text_only: bool = False
) -> dict[tuple[str, str], QuantRecipe]:
    """(scheme, method as written) -> recipe; UserError names what is unknown."""
    import yaml

    from qig_serve.offline.recipe import make_recipe

    recipes = {}
    for scheme in schemes.split(","):
        for written in methods.split(","):
            method, *fields = written.split(":")
            values: dict[str, Any] = {"scheme": scheme, "method": method, "calib": calib}
            values |= {"samples": samples, "seed": seed, "text_only": text_only}
            for field in fields:
                name, equals, value = field.partition("=")
                if not equals:
                    raise UserError(f"{written}: {field!r} must be FIELD=VALUE")
                if name in values:
                    raise UserError(f"{written}: {name} is given twice, here or as an option")
                try:
                    values[name] = yaml.safe_load(value)
                except yaml.YAMLError:
                    raise UserError(f"{written}: {value!r} is no value of {name}") from None
            recipes[scheme, written] = make_recipe(values, f"{scheme}, {written}")
    return recipes


def _recipes(args: argparse.Namespace, seed: int) -> dict[tuple[str, str], QuantRecipe]:
    return make_recipes(args.schemes, args.methods, args.calib, args.samples, seed, args.text_only)


def _seeds(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def _read_samples(args: argparse.Namespace) -> list[Sample]:
    """The questions of the first seed; UserError for what would otherwise be found after hours.

    That is: calibration samples, of any seed, and questions that cannot be read, or whose pictures
    cannot; and questions that cannot be rendered.
    """
    from qig_serve.evaluate import load_samples
    from qig_serve.model_directory import find_model, load_processor, read_config
    from qig_serve.offline.calibration.sources import load_calibration
    from qig_serve.rendering import check_samples
    from qig_serve.samples import load_image

    questions = load_samples(args.data, args.n, args.first_seed)
    for sample in questions:
        for image in sample.images:
            load_image(image)
    for seed in _seeds(args):
        recipes = _recipes(args, seed).values()
        for folder in dict.fromkeys(r.image_folder for r in recipes):
            for sample in load_calibration(args.calib, args.samples, seed, folder, args.text_only):
                for image in sample.images:
                    load_image(image)
    model = find_model(args.model)
    read_config(model)  # which names a directory that is none
    check_samples(load_processor(model), questions)
    return questions


Outcome = tuple[float, int, str | None]
"""Seconds, peak memory in bytes, and what was wrong."""


def _quantize(model: Path, output: str, recipe: QuantRecipe, sender: Connection) -> None:
    """In a process of its own: sends the Outcome."""
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.progress import host_bytes

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plain = not recipe.quant_scheme.servable
    try:
        report = quantize(model, output, recipe, quiet=True, plain=plain)
    except UserError as error:
        sender.send((0.0, 0, str(error)))
    else:
        sender.send((report.seconds, host_bytes(), None))


def _end_with_parent() -> None:
    """Ends this process when the one that began it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _quantize_apart(model: Path, output: str, recipe: QuantRecipe) -> Outcome:
    """In a fresh process, whose peak memory is then the run's own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_quantize, args=(model, output, recipe, sender))
    process.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
        return outcome
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        why = "was killed, as when memory runs out" if killed else "failed, as said above"
        return 0.0, 0, f"its process {why} (status {process.exitcode})"
    finally:
        process.terminate()
        process.join()


def _checkpoint(folder: Path, key: tuple[str, str], seed: int) -> Path:
    """Where the checkpoint of a scheme and method goes."""
    return folder / "-".join([*key, str(seed)]).replace(":", "_").replace("=", "_")


def run(args: argparse.Namespace) -> int:
    """Quantize everything, evaluate everything, print and write."""
    if args.seeds < 1 or args.samples < 1:
        raise UserError("--seeds and --samples must be at least 1")
    if not 0 <= args.first_seed < 1 << 31:
        raise UserError("--first-seed must be at least 0 and below 2^31")
    if args.kl_samples < 0 or not 1 <= args.max_tokens < 1 << 31:
        raise UserError("--kl-samples must be at least 0, --max-tokens at least 1 and below 2^31")
    if args.engine == "none" and args.kl_samples == 0:
        raise UserError("--engine none with --kl-samples 0 compares nothing: leave one of them out")
    check_targets(args.json, args.plot, read=(args.model, args.calib, args.data))
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"the plot must end in .png, .svg or .pdf, not {args.plot.name!r}")
    # Wrong ones fail now.
    wanted = _recipes(args, args.first_seed)
    if args.keep:
        if args.keep.exists() and not args.keep.is_dir():
            raise UserError(f"{args.keep} is a file: --keep takes a folder")
        for seed, key in itertools.product(_seeds(args), wanted):
            if os.path.lexists(kept := _checkpoint(args.keep, key, seed)):
                raise UserError(f"{kept} is there already: name another --keep, or remove it")
    require("matplotlib", "the report of a quantized model")

    from rich.console import Console

    from qig_serve.evaluate import EvaluationResult, load_samples
    from qig_serve.evaluation.comparison import (
        answers_table,
        asked,
        distance_table,
        pairwise_table,
        plot,
        to_json,
        types_table,
    )
    from qig_serve.evaluation.table import print_whole

    unwind_on_sigterm()
    questions = _read_samples(args)
    messages = Console(stderr=True, quiet=args.quiet)
    runs: list[Run] = []
    full: dict[int, EvaluationResult] = {}
    with tempfile.TemporaryDirectory(prefix="qig-compare-") as scratch:
        folder = args.keep or Path(scratch)
        for seed in _seeds(args):
            if seed != args.first_seed:  # of the demonstration set, others
                questions = load_samples(args.data, args.n, seed)
            runs += _one_seed(args, seed, questions, folder, full, messages)
            if args.json:  # after every seed, so that an interrupted run leaves its figures
                write_json(args.json, {"settings": _settings(args), **to_json(runs, full)})
    out = Console()
    tables = [answers_table(runs, full)] if asked(runs) else []
    tables.append(distance_table(runs, full))
    for scheme in dict.fromkeys(r.scheme for r in runs if asked(runs)):
        tables += [types_table(runs, full, scheme), pairwise_table(runs, scheme)]
    for table in tables:
        print_whole(out, table)
    if args.plot:
        plot(runs, full, args.plot)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the model: the options, versions, the machine."""
    import torch
    import transformers

    from qig_serve import __version__
    from qig_serve.model_directory import model_name

    chosen = (
        "schemes",
        "methods",
        "seeds",
        "first_seed",
        "calib",
        "samples",
        "data",
        "n",
        "kl_samples",
        "text_only",
    )
    return {
        "model": model_name(args.model),
        **{name: getattr(args, name) for name in (*chosen, "max_tokens", "engine")},
        "qig_serve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()}), no GPU"
        ),
    }


def _one_seed(
    args: argparse.Namespace,
    seed: int,
    questions: Sequence[Sample],
    folder: Path,
    full: dict[int, Any],
    messages: Console,
) -> Sequence[Run]:
    from qig_serve.evaluate import REFERENCE, evaluate_many
    from qig_serve.evaluation.comparison import Run
    from qig_serve.evaluation.table import progress_bars

    recipes = _recipes(args, seed)
    folder.mkdir(parents=True, exist_ok=True)
    costs: dict[tuple[str, str], tuple[float, int]] = {}
    directories: dict[tuple[str, str], Path] = {}
    for number, (key, recipe) in enumerate(recipes.items(), start=1):
        directories[key] = _checkpoint(folder, key, seed)
        doing = f"seed {seed}, {number}/{len(recipes)}: quantizing by {key[1]} to {key[0]}"
        messages.print(doing, highlight=False, markup=False)
        seconds, peak, wrong = _quantize_apart(args.model, str(directories[key]), recipe)
        if wrong:
            raise UserError(f"{', '.join(key)}, seed {seed}: {wrong}")
        costs[key] = (seconds, peak)
    with progress_bars(messages, args.quiet) as progress:
        results = evaluate_many(
            [(f"{scheme} {method}", d) for (scheme, method), d in directories.items()],
            args.model,
            questions,
            engine=args.engine,
            kl_samples=args.kl_samples,
            max_tokens=args.max_tokens,
            progress=progress,
        )
    full[seed] = results[REFERENCE]
    return [
        Run(scheme, method, seed, results[f"{scheme} {method}"], *costs[scheme, method])
        for scheme, method in recipes
    ]
