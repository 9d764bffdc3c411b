"""Show how much weight QIG gives to the parts of a picture and to words.

Nothing is quantized: the token weights of the chosen layers are those with which the search of
`quantize` would begin. An .html file shows everything and needs no other file; .png is a picture.

examples:
  qig-serve attribute my-model --image chart.png --prompt "What is the total?" -o chart.html
  qig-serve attribute my-model --image cat.jpg --prompt "Describe it." --answer "A cat." \\
      --layers 0,7,15 --scheme w4a8 -o cat.png --json cat.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qig_serve.cli import add_json, add_model, check_targets, utf8
from qig_serve.errors import UserError
from qig_serve.json_output import write_json, write_whole

_MOST_STEPS = 256
HELP = "show on a picture which tokens the method weighs, without quantizing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser, "model", "MODEL", "full-precision model directory")
    parser.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="picture (repeatable)"
    )
    parser.add_argument("--prompt", type=utf8, required=True, help="question about the picture")
    parser.add_argument("--answer", type=utf8, help="answer, whose tokens are weighed too")
    parser.add_argument(
        "--layers", metavar="I,J,...", help="decoder layers (default: first, middle, last)"
    )
    parser.add_argument(
        "--scheme", default="w3a16", help="what the layers are rounded to (default: w3a16)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="nodes of the quadrature (default: 8)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".html or .png"
    )
    add_json(parser, "the weights")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def parse_layers(text: str | None, count: int) -> list[int]:
    """Layer numbers; negative ones count from the end. UserError when one does not exist."""
    if text is None:
        return sorted({0, count // 2, count - 1})
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers takes numbers separated by commas, not {text!r}") from None
    for number in numbers:
        if not -count <= number < count:
            raise UserError(f"the model has layers 0 to {count - 1}, not {number}")
    return sorted({number % count for number in numbers})


def run(args: argparse.Namespace) -> int:
    """Attribute and write the picture."""
    from qig_serve.records import resolve_picture

    if args.output.suffix not in (".html", ".png"):
        raise UserError(f"the output must end in .html or .png, not {args.output.name!r}")
    if not 1 <= args.steps <= _MOST_STEPS:
        raise UserError(f"--steps must be at least 1 and at most {_MOST_STEPS}")

    from qig_serve.extras import require

    require("matplotlib", "the picture")
    images = [resolve_picture(image, "--image", Path()) for image in args.image]
    check_targets(args.output, args.json, read=[args.model, *images])

    from rich.console import Console

    from qig_serve.evaluation.table import progress_bars
    from qig_serve.offline.explain import explain_sample
    from qig_serve.offline.report.page import picture_page

    console = Console(stderr=True)
    with progress_bars(console, args.quiet, unit="layers") as progress:
        picture, errors = explain_sample(
            args.model,
            images,
            args.prompt,
            args.answer,
            lambda count: parse_layers(args.layers, count),
            args.scheme,
            args.steps,
            progress,
        )
    if args.output.suffix == ".png":
        from qig_serve.offline.report.drawing import picture_png

        picture_png(picture, args.output)
    else:
        page = picture_page(picture, str(args.model), args.scheme)
        write_whole(args.output, page.encode(errors="replace"))
    if args.json:
        write_json(args.json, picture.to_json(errors))
    if not args.quiet:
        for layer, error in errors.items():
            share = picture.image_share(layer)
            console.print(
                f"{layer}: {share:.0%} of the weight on the image, completeness error {error:.2%}",
                highlight=False,
            )
        console.print(f"wrote {args.output}", highlight=False, markup=False)
    return 0
