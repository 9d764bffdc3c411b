"""The forms in which one run's numbers are published: what config.json says, and the tensors.

qig                  packed tensors as formats.py has them; what our plugin and loader read
compressed-tensors   the same numbers for vLLM without this package (compressed_tensors.py)
plain                the weights that the codes stand for, under the source's names and in its
                     dtype: an ordinary model, for comparing methods. Internal: schemes without a
                     kernel have no other form
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from qig_serve.family_row import Architecture
from qig_serve.formats import VOCABULARY_SCHEME, QuantScheme
from qig_serve.manifest import QuantizationConfig
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.packing import pack_rows, unpack_linear

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How the blocks that a run has packed become a checkpoint."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """What is added to the source's config.json."""
    convert: Callable[[Tensors], Tensors] | None = None
    """Tensors of a packed block's shard, by name, as they are published; None: as they are."""
    eight_bit: frozenset[str] = frozenset()
    """Output head and embedding, where they are stored in 8 bits."""

    def outside(self, name: str, tensor: torch.Tensor) -> Tensors:
        """A tensor of the source that is in no block, as it is published."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.eight_bit:
            return {name: tensor}
        packed = pack_rows(tensor, VOCABULARY_SCHEME)
        return {f"{module}.{suffix}": part for suffix, part in packed.items()}


def qig(config: QuantizationConfig) -> Form:
    """Our own form."""
    return Form({"quantization_config": config.to_json()}, eight_bit=frozenset(config.eight_bit))


def compressed(config: QuantizationConfig, arch: Architecture, left_alone: Iterable[str]) -> Form:
    """The form of compressed-tensors; ours stands in config.json under "qig", for people."""
    scheme = config.quant_scheme
    theirs = compressed_tensors.quantization_config(arch, scheme, left_alone)
    return Form(
        {"quantization_config": theirs, "qig": config.to_json()},
        partial(compressed_tensors.compress, scheme=scheme),
    )


def plain(scheme: QuantScheme, source: SourceCheckpoint) -> Form:
    """Ordinary weights in the source's dtype."""

    def unpacked(tensors: Tensors) -> Tensors:
        linears, rest = packed_linears(tensors)
        for linear, parts in linears.items():
            name = f"{linear}.weight"
            rest[name] = unpack_linear(parts, scheme).to(source.tensor(name).dtype)
        return source.joined(rest)

    return Form(convert=unpacked)
