"""inspect."""

from __future__ import annotations

import argparse

HELP = "inspect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    raise NotImplementedError
