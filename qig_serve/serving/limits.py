"""The server's limits: options of `qig-serve serve`, handed on through the environment.

vLLM may run several API processes; the environment is what all of them inherit.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass

_PREFIX = "QIG_SERVE_"


@dataclass(frozen=True)
class Limits:
    """Bounds on what one request, and all together, may ask for."""

    max_body_mb: int = 64
    max_image_pixels: int = 33_554_432
    max_queued_requests: int = 256

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare an option for each limit."""
        texts = {
            "max_body_mb": "refuse a larger request body (MiB) with 400",
            "max_image_pixels": "refuse a picture with more pixels (width x height) with 400",
            "max_queued_requests": (
                "answer 503 with Retry-After when so many requests are running or waiting "
                "(in each API process)"
            ),
        }
        for name, default in dataclasses.asdict(cls()).items():
            parser.add_argument(
                "--" + name.replace("_", "-"),
                type=int,
                default=default,
                metavar="N",
                help=f"{texts[name]}; default %(default)s",
            )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Limits:
        """The limits that were asked for."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def from_environment(cls) -> Limits:
        """The limits that `to_environment` left, or the defaults."""
        defaults = dataclasses.asdict(cls()).items()
        return cls(**{k: int(os.environ.get(_PREFIX + k.upper(), v)) for k, v in defaults})

    def to_environment(self) -> None:
        """Leave the limits to this process and those it starts."""
        for name, value in dataclasses.asdict(self).items():
            os.environ[_PREFIX + name.upper()] = str(value)
