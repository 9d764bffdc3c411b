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

from qig_serve.architectures import Architecture
from qig_serve.formats import QuantScheme
from qig_serve.manifest import QuantizationConfig
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.packing import unpack_linear

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How the blocks that a run has packed become a checkpoint."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """What is added to the source's config.json."""
    convert: Callable[[Tensors], Tensors] | None = None
    """Tensors of a packed block's shard, by name, as they are published; None: as they are."""


def qig(config: QuantizationConfig) -> Form:
    """Our own form."""
    return Form({"quantization_config": config.model_dump(mode="json")})


def compressed(config: QuantizationConfig, arch: Architecture, left_alone: Iterable[str]) -> Form:
    """The form of compressed-tensors; ours stands in config.json under "qig", for people."""
    scheme = config.quant_scheme
    theirs = compressed_tensors.quantization_config(arch, scheme, left_alone)
    return Form(
        {"quantization_config": theirs, "qig": config.model_dump(mode="json")},
        partial(compressed_tensors.compress, scheme=scheme),
    )


def plain(scheme: QuantScheme, source: SourceCheckpoint) -> Form:
    """Ordinary weights in the source's dtype."""

    def unpacked(tensors: Tensors) -> Tensors:
        linears, rest = packed_linears(tensors)
        for linear, parts in linears.items():
            name = f"{linear}.weight"
            rest[name] = unpack_linear(parts, scheme).to(source.tensor(name).dtype)
        return rest

    return Form(convert=unpacked)
