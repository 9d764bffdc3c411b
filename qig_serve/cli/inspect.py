"""Show what a quantized checkpoint holds, and check that no file of it was changed.

Exit status 1 when a file or a tensor is not what it should be.

examples:
  qig-serve inspect DIR
  qig-serve inspect DIR --verify
  qig-serve inspect DIR --verify --json
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qig_serve.cli import add_json, add_model, check_targets
from qig_serve.json_output import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from qig_serve.inspection import Inspection

HELP = "show what a checkpoint holds, and check its hashes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser, "directory", "DIR", "quantized checkpoint")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with its sha256 in the manifest"
    )
    add_json(parser, "everything")
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")


def run(args: argparse.Namespace) -> int:
    """Print the checkpoint's facts; 1 when something is wrong with it."""
    from rich.console import Console

    from qig_serve.errors import UserError
    from qig_serve.evaluation.table import progress_bars
    from qig_serve.inspection import inspect, verify

    check_targets(args.json, read=[args.directory])
    console = Console(highlight=False, markup=False, soft_wrap=True)
    wrong: list[str] = []
    found = None
    if args.verify and args.directory.is_dir():
        # First: a damaged header keeps the rest from being read, and the hash says which file.
        with progress_bars(Console(stderr=True), args.quiet, unit="files") as progress:
            wrong = verify(args.directory, progress)
    try:
        found = inspect(args.directory)
    except UserError:
        if not wrong:
            raise
    else:
        wrong += found.problems
    if args.json:
        write_json(args.json, _record(found, wrong, args.verify))
    if found is not None and not args.quiet:
        _print_facts(console, found)
    for sentence in wrong:
        console.print(f"WRONG  {sentence}")
    if args.verify and not wrong and not args.quiet:
        console.print("verified: every file is as it was written")
    return 1 if wrong else 0


def _record(found: Inspection | None, wrong: list[str], verified: bool) -> dict[str, Any]:
    """Facts and problems; the problems alone where the checkpoint cannot be read."""
    record: dict[str, Any] = {"problems": wrong, "hashes_compared": verified}
    if found is None:
        return record
    config = found.config
    return record | {
        "scheme": config.scheme,
        "method": config.method,
        "produced_by": config.produced_by,
        "family": found.model_type,
        "calibration": config.calibration.model_dump(mode="json") if config.calibration else None,
        "bytes": found.nbytes,
        "bytes_in_16_bits": found.bytes_in_16_bits,
        "bits_per_weight": found.bits,
        "bits_per_weight_of_model": found.bits_of_model,
        "tensor_parallel_sizes": config.tensor_parallel_sizes,
        "linears": {
            linear.name: {"out": linear.n, "in": linear.k, "bits_per_weight": linear.bits}
            for linear in found.linears
        },
        "vocabulary": {
            table.name: {"out": table.n, "in": table.k, "bits_per_weight": table.bits}
            for table in found.vocabulary
        },
        "left_in_16_bits": found.left_alone(),
    }


def _print_facts(console: Console, found: Inspection) -> None:
    from rich.table import Table

    from qig_serve import sizes
    from qig_serve.tensor_parallel import in_words

    config, scheme = found.config, found.config.quant_scheme
    weights = f"{scheme.bits}-bit weights, " + (
        f"groups of {scheme.group_size}" if scheme.group_size else "one scale per output channel"
    )
    activations = f"{scheme.activation_bits}-bit" if scheme.activation_bits else "16-bit"
    refused = config.summary.get("tensor_parallel_refused", {})
    facts = [
        ("scheme", f"{scheme.name}: {weights}, {activations} activations"),
        ("method", f"{config.method}, by {config.produced_by or 'an unknown producer'}"),
        ("family", found.model_type),
        (
            "size",
            f"{sizes.in_words(found.nbytes)} of tensors, {found.bits_of_model:.2f} bits per weight "
            f"over all of the model; {sizes.in_words(found.bytes_in_16_bits)} with every weight in "
            "16 bits",
        ),
        (
            "quantized",
            f"{len(found.linears)} linears, {found.bits:.3f} bits per weight with scales and zeros",
        ),
        ("tensor parallel", in_words(config.tensor_parallel_sizes, refused)),
    ]
    if config.calibration is not None:
        c = config.calibration
        source = f"{c.samples} samples of {c.source}, seed {c.seed}, sha256 {c.sha256[:16]}"
        facts.insert(2, ("calibrated on", source))
    for name, text in facts:
        console.print(f"{name:<16}{text}")

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("quantized", "linears", "out x in", "bits per weight"):
        table.add_column(column, justify="left" if column.startswith("q") else "right")
    kinds: dict[tuple[str, int, int], list[float]] = {}
    for linear in [*found.linears, *found.vocabulary]:
        *_, owner, leaf = ["", *linear.name.split(".")]
        kind = f"experts.*.{leaf}" if owner.isdecimal() else f"{owner}.{leaf}".lstrip(".")
        kinds.setdefault((kind, linear.n, linear.k), []).append(linear.bits)
    for (kind, n, k), bits in kinds.items():
        table.add_row(kind, str(len(bits)), f"{n} x {k}", f"{sum(bits) / len(bits):.3f}")
    console.print()
    console.print(table)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("left in 16 bits")
    table.add_column("size", justify="right")
    for module, nbytes in found.left_alone().items():
        table.add_row(module, sizes.in_words(nbytes))
    console.print()
    console.print(table)
