"""Print the completion script of a shell, for commands, options, choices and file names.

examples:
  qig-serve completion bash > ~/.local/share/bash-completion/completions/qig-serve
  qig-serve completion zsh > "${fpath[1]}/_qig-serve"
  qig-serve completion fish > ~/.config/fish/completions/qig-serve.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

HELP = "print shell completion for bash, zsh or fish"
SHELLS = ("bash", "zsh", "fish")

# What an argument names by its metavar or, where it has none, by its type.
_DIRECTORIES = ("DIR", "MODEL", "SOURCE")
_FILES = ("FILE", "PATH", "SRC")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=SHELLS, help="the shell it is for")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from qig_serve.cli import make_parser
    from qig_serve.extras import require

    require("shtab", "the completion script")
    import shtab

    parser = make_parser(None)
    for action in _actions(parser):
        if action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif isinstance(action.metavar, str) and action.metavar.startswith("{"):
            action.choices = action.metavar[1:-1].split(",")  # of the recipe, which checks them
    print(shtab.complete(parser, args.shell))
    return 0
