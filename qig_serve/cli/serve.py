"""Serve a quantized checkpoint with vLLM's OpenAI-compatible server.

    qig-serve serve DIR [any flag of `vllm serve`]

Safer than vLLM's defaults: pictures by remote URL only with --allowed-media-domains, and then
from public addresses without redirects; --api-key covers every route but /health; requests that
are too large or too many are refused. SIGTERM and Ctrl-C end the server at once while it starts,
and later when the running requests are answered; a second Ctrl-C does not wait for them. A web
page to try the model is at `/`, a description of the checkpoint at `/v1/quantization`.
`qig-serve serve DIR --help=all` lists vLLM's flags.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from importlib.util import find_spec

from qig_serve.cli import add_model

_SUPERVISED = ("--api-server-count", "-asc", "--headless", "--data-parallel", "-dp")
"""vLLM's flags with which this process only watches others, and stops them on Ctrl-C itself."""

HELP = "serve a checkpoint over HTTP (OpenAI-compatible, vLLM)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; what is not ours is vLLM's."""
    add_model(parser, "directory", "DIR", "written by qig-serve quantize")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="...", help="flags of vllm serve"
    )
    own = _own_options().format_help().partition("options:\n")[2]
    parser.epilog = f"after DIR, together with flags of vllm serve:\n{own}"


def _own_options() -> argparse.ArgumentParser:
    from qig_serve.serving.limits import Limits

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="")
    Limits.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    from qig_serve.serve import serve
    from qig_serve.serving.limits import Limits

    own, flags = _own_options().parse_known_args(args.flags)
    supervised = any(flag.replace("_", "-").startswith(_SUPERVISED) for flag in flags)
    if not supervised and find_spec("vllm"):  # which brings what this needs; serve says if it lacks
        from qig_serve.serving.stop_signals import take_stop_signals

        take_stop_signals()
    status = serve(args.directory, flags, Limits.from_arguments(own))
    # Triton's bindings, of which vLLM holds some to the end, print a page of leaks where Python
    # takes itself down; all that is to be done before has been done.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
