"""Published files of experts, read as one tensor per expert and projection.

Some files hold a block's experts in two 3-D tensors, others one tensor each, which is what experts
are everywhere else here (qig_serve/experts.py). An expert's part of a 3-D tensor is read when it is
asked for, so that no block is in memory twice.
"""

from __future__ import annotations

import re
from typing import Any

from qig_serve.errors import UserError
from qig_serve.experts import count_field
from qig_serve.family_row import EXPERTS
from qig_serve.offline.source.tensors import SourceCheckpoint

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unfuse(source: SourceCheckpoint, prefix: str, config: Any) -> None:
    """Has every 3-D tensor of the blocks under `prefix` go by the names of its experts' weights.

    config: the decoder's. [E, out, in], or as Qwen3-VL's files have it [E, in, out], which the
    shape shows; of a square one the first, as transformers takes it. UserError for other shapes.
    """
    fused = re.compile(rf"{re.escape(prefix)}\d+\.(?:\w+\.)*{EXPERTS}\.({'|'.join(_PARTS)})")
    for name in source:
        if not (match := fused.fullmatch(name)):
            continue
        experts, parts = int(getattr(config, count_field(config), 0)), _PARTS[match[1]]
        width, hidden = int(config.moe_intermediate_size), int(config.hidden_size)
        sizes = (2 * width, hidden) if len(parts) == 2 else (hidden, width)
        shape = source.shape(name)
        if shape not in ((experts, *sizes), (experts, *sizes[::-1])):
            raise UserError(
                f"{name} is {list(shape)} in {source.directory}, but config.json asks for "
                f"{[experts, *sizes]}: give files and configuration of one model"
            )
        owner = name.removesuffix(match[1])
        names = [f"{owner}{e}.{part}.weight" for e in range(experts) for part in parts]
        source.split(name, names, transposed=shape[1:] != sizes)
