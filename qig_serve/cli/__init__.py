"""The `qig-serve` command: one file per subcommand, heavy imports inside the call.

A subcommand is a module here with `HELP: str`, `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qig_serve.json_output import STANDARD_OUTPUT, standard_output

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
    "completion",
)

_EPILOG = """\
exit statuses:
  0    done
  1    done, but something failed: a hash, a line of a batch, a request to a server
  2    the input was wrong: one sentence on standard error says what, and what to do
  130  interrupted (143: terminated); `quantize --resume` and `generate --resume` go on from there
  141  whatever read the output has closed it, as `| head` does

for scripts: results go to standard output, everything else to standard error. --quiet shows no
progress. --json prints the figures as JSON instead of the text; --json FILE prints the text and
writes the figures into FILE. Colours and progress bars are for terminals only (NO_COLOR takes the
colours away there too).

`qig-serve COMMAND --help` shows the options of a command, with examples.
"""


_NO_ENGINE = "vLLM's engine did not start: its own messages above say why"


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong: `quantize` alone has 20 lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the subcommand asked for is imported, unless none was named."""
    from qig_serve import __version__

    parser = _Parser(
        prog="qig-serve",
        description="Quantize vision-language models with QIG and serve them with vLLM.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def unwind_on_sigterm() -> None:
    """SIGTERM unwinds as Ctrl-C does, so that nothing half-written is left; exit status 143."""

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)


def expand_home(args: argparse.Namespace) -> None:
    """Has paths mean what they say: shells leave the ~ of --output=~/x, and it is no folder."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))


def add_json(parser: argparse._ActionsContainer, what: str) -> None:
    """Declare --json, which is the same in all commands."""
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help=f"write {what} into FILE as JSON; without FILE: print the JSON instead of the text",
    )


def add_model(
    parser: argparse.ArgumentParser, name: str, metavar: str, what: str, **more: Any
) -> None:
    """Declare an argument that names a model, which is the same in all commands."""
    from qig_serve.model_directory import find_model

    text = f"{what}, or org/name of the hub if it is in the hub's local cache"
    parser.add_argument(name, type=find_model, metavar=metavar, help=text, **more)


def utf8(text: str) -> str:
    """A text from the command line, where bytes may be any; for argparse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no text in UTF-8") from None
    return text


def _json_before_a_folder(words: list[str]) -> list[str]:
    """Has `--json DIR` mean the flag and a checkpoint: a folder is no file to write into."""
    return [
        "--json=-" if word == "--json" and os.path.isdir(following) else word
        for word, following in zip(words, [*words[1:], "-"], strict=False)
    ]


def check_targets(*paths: Path | None, read: Iterable[object] = ()) -> None:
    """UserError for a file that cannot be written when the work is done; None is no file.

    read: what the command reads; of that, files and what is in folders are not written over.
    """
    from qig_serve.errors import UserError

    sources = [os.path.realpath(str(source)) for source in read if os.path.lexists(str(source))]
    wanted = [path for path in paths if path not in (None, STANDARD_OUTPUT)]
    targets = [Path(os.path.realpath(path)) for path in wanted]
    for path, target in zip(wanted, targets, strict=True):
        if targets.count(target) > 1:
            raise UserError(f"{path} is to be written twice: give two names")
        if target.is_file() and not {str(target), *map(str, target.parents)}.isdisjoint(sources):
            raise UserError(f"{path} is there, and among what this command reads: name a new file")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
        if not path.absolute().parent.is_dir():
            raise UserError(f"the folder of {path} does not exist")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise UserError(f"{path} cannot be written: its folder, or the file, is read-only")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    # No usage reports and no hub look-ups behind the user's back; both can be switched on.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # OpenMP threads that spin while they wait starve the others on a busy machine (measured 20
    # times slower), and waking them for every small operation costs a quarter on a quiet one: they
    # spin for a few microseconds. Read when torch is loaded, hence here.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _make_up_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((w for w in words if not w.startswith("-")), None)
    if command != "demo":  # which is given no checkpoint
        words = _json_before_a_folder(words)
    # Those that draw progress: vLLM binds memory aloud.
    if command in ("compare", "demo", "evaluate", "quantize"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = make_parser(command)
    args, unknown = parser.parse_known_args(words)
    if unknown:  # said with the help of the command
        fault = f"unknown options: {' '.join(unknown)}"
        if "--json=-" in words and os.path.isdir(unknown[0]):
            fault = f"--json writes a file, and {unknown[0]} is a folder: name a file in it"
        _Parser(prog=f"{parser.prog} {args.command}").error(fault)
    expand_home(args)

    from qig_serve.errors import UserError

    try:
        with standard_output(getattr(args, "json", None) == STANDARD_OUTPUT):
            status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"qig-serve {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _nobody_reads_the_output():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return 128 + signal.SIGPIPE
    except OSError as error:  # a path that nothing foresaw: too long, through a file, on a bad disk
        where = error.filename or _refused_output()
        if where is None or error.strerror is None:
            raise
        print(f"qig-serve {args.command}: {where}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from qig_serve.vllm_plugin import patches

        if not patches.engine_did_not_start(error):
            raise
        print(f"qig-serve {args.command}: {_NO_ENGINE}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qig-serve {args.command}: interrupted", file=sys.stderr)
        return 130


def _make_up_streams() -> None:
    """Has output go nowhere where it is closed: print() takes standard output for a closed error.

    Has names of files that are not UTF-8 be printed as they are, which Python does in some locales
    alone. And has tables be of a width: a terminal that has none makes rich print nothing.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


def _refused_output() -> str | None:
    """ "standard output" if that cannot be written, as on a full disk; it is given up then."""
    try:
        os.write(1, b"\n")  # what could not be written may be out of the buffer
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "standard output"
    return None


def _nobody_reads_the_output() -> bool:
    """Whether standard output is a pipe whose reader is gone, as of `| head`."""
    output = select.poll()
    output.register(1, 0)
    return any(events & select.POLLERR for _, events in output.poll(0))
