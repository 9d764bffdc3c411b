"""Every vLLM import that the plugin and the server need, and where it lives in 0.26 to 0.33.

Nothing else under qig_serve/ imports a vLLM path that has moved. Names that moved are looked up
in the order newest to oldest; one that is nowhere is an ImportError that says what was tried.
"""

from __future__ import annotations

import importlib
from typing import Any


def find(name: str, *modules: str) -> Any:
    """`name` from the first of the modules that has it; ImportError if none does."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"vLLM has no {name} in {', '.join(modules)}")
