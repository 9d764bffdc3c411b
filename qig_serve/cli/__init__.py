"""The `qig-serve` command: one file a subcommand, heavy imports inside the call.

A subcommand is a module here with `HELP: str`, `add_arguments(parser)` and `run(args) -> int`.
Exit statuses: 0 done; 1 the work was done and something failed (a hash, a line of a batch);
2 the input was wrong, one sentence says what; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = (
    "quantize",
    "serve",
    "generate",
    "doctor",
    "evaluate",
    "compare",
    "attribute",
    "inspect",
    "families",
    "convert",
    "demo",
)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the subcommand asked for is imported, unless none was named."""
    from qig_serve import __version__

    parser = argparse.ArgumentParser(
        prog="qig-serve",
        description="Quantize vision-language models with QIG and serve them with vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"qig-serve {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"qig_serve.cli.{name}")
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command in (None, name):
            module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    # No usage reports and no hub look-ups behind the user's back; both can be switched on.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # OpenMP threads that spin while they wait starve the others on a busy machine: measured 20
    # times slower. Read when torch is loaded, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((w for w in words if not w.startswith("-")), None)
    args = _parser(command).parse_args(words)

    from qig_serve.errors import UserError

    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"qig-serve {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qig-serve {args.command}: interrupted", file=sys.stderr)
        return 130
