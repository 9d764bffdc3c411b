"""What stands in a model for its decoder blocks, and notes what the model would give them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve.errors import UserError

AFTER = "hidden_states_added_after"
"""Keyword argument of a block: what the model adds to its output (Qwen3-VL's deepstack)."""
CACHE = ("past_key_values", "past_key_value", "use_cache", "cache_position")
"""Keyword arguments of a block that are left out: nothing is generated."""
ONE_MODEL = "config.json, tokenizer and processor must be those of one model"


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to its decoder for one batch."""

    hidden: torch.Tensor
    """Input of block 0, [B, T, C]."""
    _kwargs: tuple[dict[str, Any], ...] = field(repr=False)

    def kwargs(self, index: int) -> Mapping[str, Any]:
        """Keyword arguments with which the model calls block `index`: masks, positions."""
        return self._kwargs[index]


class Catcher(nn.Module):
    """Stands in for a block: keeps what it is called with and passes its input on."""

    def __init__(
        self,
        calls: list[tuple[torch.Tensor, dict[str, Any]]],
        attention_type: str | None,
        names: Sequence[str],
    ) -> None:
        """names: of a block's arguments, for those that the model passes by position."""
        super().__init__()
        self._calls = calls
        self._names = names
        self.attention_type = attention_type  # older transformers choose the mask by it
        self.instead: torch.Tensor | None = None
        """What is passed on in place of the input, for once."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.instead is not None:
            return self.instead
        named = dict(zip(self._names, args, strict=False))
        self._calls.append((hidden_states, {**named, **kwargs}))
        return hidden_states


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left, on a GPU or here."""
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in texts
    )


@contextmanager
def computing(directory: Path) -> Iterator[None]:
    """Inside, what the model's own code raises becomes a UserError; lack of memory does not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"{directory}: the model cannot compute a sample ({reason[:300]}): {ONE_MODEL}"
        ) from None


def add_after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a block: adds to its output what the model would add after it."""
    added = kwargs.get(AFTER)
    if added is None:
        return output
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    return output + added


def with_few_blocks(config: Any) -> Any:
    """The configuration with the fewest blocks that show every kind of attention there is."""
    few = copy.deepcopy(config)
    text = few.get_text_config()
    types = getattr(text, "layer_types", None)
    count = 1
    if types:
        count = 1 + max(types.index(kind) for kind in set(types))
        text.layer_types = list(types[:count])
    text.num_hidden_layers = count
    if getattr(text, "num_experts", None):
        text.num_experts = text.num_experts_per_tok = 1  # blocks are replaced: as little as can be
    return few
