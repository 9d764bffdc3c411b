"""Quantize vision-language models to 3- and 4-bit weights with QIG, and serve them with vLLM.

    from qig_serve import QuantRecipe, quantize

    report = quantize("MODEL", "MODEL-w3a16", QuantRecipe(scheme="w3a16", calib="samples.jsonl"))

These two are imported when they are asked for: serving needs neither of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qig_serve.offline.pipeline import quantize
    from qig_serve.offline.recipe import QuantRecipe

__all__ = ["QuantRecipe", "__version__", "quantize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "quantize":
        from qig_serve.offline.pipeline import quantize

        return quantize
    if name == "QuantRecipe":
        from qig_serve.offline.recipe import QuantRecipe

        return QuantRecipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
