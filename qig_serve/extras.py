"""The packages that only some commands need: extras of this one, named where one is missing."""

from __future__ import annotations

import importlib.util

from qig_serve.errors import UserError

EXTRAS = {
    "datasets": "datasets",
    "matplotlib": "quantize",
    "openai": "client",
    "shtab": "completion",
    "sklearn": "demo",
}
"""Module -> the extra of pyproject.toml that brings it."""


def require(module: str, purpose: str) -> None:
    """UserError, one sentence with the extra to install, if a module of EXTRAS is missing.

    purpose: what needs it, as the beginning of the sentence. To be called before the work begins.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{purpose} needs {module}, which is not installed: pip install "
            f"'qig-serve[{EXTRAS[module]}]'"
        )
