"""What stands in a model for its decoder blocks, and notes what the model would give them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve.errors import UserError
from qig_serve.experts import count_field

AFTER = "hidden_states_added_after"
"""Keyword argument of a block: what the model adds to its output (Qwen3-VL's deepstack)."""
SHARED = "shared_kv_states"
"""Keyword argument of a block: keys and values that some blocks note and later ones read."""
PER_LAYER_INPUT = "per_layer_input"
"""Keyword argument of a block: an embedding of the tokens, [B, T, D], for this block alone."""
LARGE = (AFTER, PER_LAYER_INPUT)
"""Keyword arguments that are a value of every token for one block alone."""
CACHE = ("past_key_values", "past_key_value", "use_cache", "cache_position")
"""Keyword arguments of a block that are left out: nothing is generated."""
ONE_MODEL = "config.json, tokenizer and processor must be those of one model"


class SharedKeys(UserDict[str, tuple[torch.Tensor, torch.Tensor]]):
    """Attention's kind -> keys and values of one batch, in host memory, without gradients.

    The blocks that read them move them to their own device.
    """

    def __setitem__(self, kind: str, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        keys, values = states
        super().__setitem__(kind, (keys.detach().to("cpu"), values.detach().to("cpu")))


Fetch = Callable[[torch.device], torch.Tensor]
"""Brings a tensor that waits somewhere to a device."""


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to its decoder for one batch."""

    hidden: torch.Tensor
    """Input of block 0, [B, T, C]."""
    _kwargs: tuple[dict[str, Any], ...] = field(repr=False)

    def kwargs(self, index: int) -> Mapping[str, Any]:
        """Keyword arguments with which the model calls block `index`: masks, positions."""
        found, device = self._kwargs[index], self.hidden.device
        waiting = {name: found[name] for name in LARGE if found.get(name) is not None}
        return found | {n: w(device) if callable(w) else w.to(device) for n, w in waiting.items()}

    def put_away(self, put: Callable[[torch.Tensor], Fetch]) -> BlockInputs:
        """The same with no tokens in `hidden`, and with what is large where `put` puts it."""
        kwargs = tuple(
            k | {name: put(k[name]) for name in LARGE if k.get(name) is not None}
            for k in self._kwargs
        )
        return BlockInputs(self.hidden[:0], kwargs)

    def embedded_as(self, other: BlockInputs) -> BlockInputs:
        """The same, with what the embeddings give in `other`; its own keys and values."""
        pairs = zip(self._kwargs, other._kwargs, strict=True)
        kwargs = tuple(
            k | {PER_LAYER_INPUT: o[PER_LAYER_INPUT]} if PER_LAYER_INPUT in o else k
            for k, o in pairs
        )
        return BlockInputs(other.hidden, kwargs).apart()

    def apart(self) -> BlockInputs:
        """The same for another stream of hidden states, which has its own keys and values.

        Where a block reads those of an earlier one, blocks must be run in their order.
        """
        shared = SharedKeys()
        return replace(
            self, _kwargs=tuple(k | {SHARED: shared} if SHARED in k else k for k in self._kwargs)
        )


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
    if getattr(text, "hidden_size_per_layer_input", None):
        # One table holds the embeddings for all blocks: as many, with as few channels as can be.
        text.num_attention_heads = text.num_key_value_heads = 1
        text.intermediate_size = 128  # that every scheme can store
        return few
    types = getattr(text, "layer_types", None)
    count = 1
    if types:
        count = 1 + max(types.index(kind) for kind in set(types))
        text.layer_types = list(types[:count])
    text.num_hidden_layers = count
    if field := count_field(text):  # blocks are replaced: as little as can be
        setattr(text, field, 1)
        text.num_experts_per_tok = 1
    return few
