"""What a model family's row consists of; the rows themselves are in architectures.py.

Paths are those of the Hugging Face model; prefixes are those of the tensors in published files,
which may be older than the module names of the installed transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class SmoothingGroup:
    """A previous op, the linears that read its output, and where their damage is measured."""

    name: str
    """For reports: qkv, o, gate_up, down."""
    previous: str
    """Path, inside a block, of the norm or linear into which scales are folded; "" if none."""
    linears: tuple[str, ...]
    """Paths of the linears."""
    loss_module: str
    """Path of the module whose output is compared; a linear's own path for that linear."""
    kind: Literal["norm", "linear", "none"]
    """linear: scales divide output rows; a value projection's are shared by the query heads."""
    norm_offset: float = 0.0
    """1 for norms that multiply by (1 + weight)."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the linears read the i-th of n equal parts of a fused previous linear's outputs."""
    readers: tuple[str, ...] = ()
    """Linears that stay in 16 bits and read the same: they take up the scales too."""
    expert: int | None = None
    """Number of the expert, where the group is one expert's: it sees what is routed to it."""

    def of_experts(self, count: int) -> Iterator[SmoothingGroup]:
        """The groups of a block with so many experts, for whose number a row's paths have `*`.

        One for each expert where the previous op is an expert's, and one for all otherwise.
        """

        def numbered(e: int) -> tuple[str, ...]:
            return tuple(name.replace("*", str(e)) for name in self.linears if "*" in name)

        if "*" in self.previous:
            for e in range(count):
                previous, loss = (p.replace("*", str(e)) for p in (self.previous, self.loss_module))
                yield replace(
                    self, previous=previous, linears=numbered(e), loss_module=loss, expert=e
                )
            return
        others = (name for name in self.linears if "*" not in name)
        yield replace(self, linears=(*(n for e in range(count) for n in numbered(e)), *others))


EXPERTS = "experts"
"""Name of the module that holds a block's experts, wherever in the block a family has it: numbered
modules of ordinary linears (experts.py)."""
_EXPERT = re.compile(rf"^((?:\w+\.)*{EXPERTS})\.(\d+)\.")


def expert_number(name: str) -> int | None:
    """The number of the expert that a linear's path inside a block is of; None for others."""
    found = _EXPERT.match(name)
    return int(found[2]) if found else None


def any_expert(name: str) -> str:
    """A linear's path inside a block, with `*` for the number of its expert."""
    return _EXPERT.sub(r"\1.*.", name)


_TOWERS = ("vision_tower.", "model.vision_tower.")
_LEVEL = "vision_model."

PictureLayout = Literal[
    "grid",
    "anyres",
    "cut",
    "merged",
    "placed",
    "pieces",
    "sized",
    "sliced",
    "tiles",
    "split",
    "pooled",
]


@dataclass(frozen=True)
class Architecture:
    """One family."""

    name: str
    """`model_type` of config.json."""
    decoder: str
    """Path of the module that holds the decoder's `layers`."""
    source_prefixes: tuple[str, ...]
    """What may stand before `0.self_attn...` in the files; the first that is there counts."""
    groups: tuple[SmoothingGroup, ...]
    """Of a block, in the order of execution."""
    vllm_class: str
    """What vLLM serves it with."""
    pictures: PictureLayout
    """How the image tokens lie on a picture: a function of offline/report/token_map.py."""
    note: str = ""
    text_types: tuple[str, ...] = ()
    """`model_type` of the decoders with these groups; empty where a family has one of its own."""
    splits_tower: bool = True
    """False where vLLM keeps the vision tower whole if its heads do not divide."""
    levelled_towers: tuple[str, ...] = ()
    """`model_type` of vision towers whose tensors vLLM wants as `vision_tower.vision_model.*`.

    transformers 5 leaves that level out where it saves a model under its modules' names.
    """
    renamed: tuple[tuple[str, str], ...] = ()
    """(prefix of tensors saved under the names of transformers' modules, that which vLLM knows)."""
    other_groups: tuple[tuple[SmoothingGroup, ...], ...] = ()
    """Where blocks are of several kinds: the groups of the others."""
    kept: tuple[str, ...] = ()
    """Paths, inside a block, of linears that stay in 16 bits; where there are experts, what
    chooses them comes first."""
    embedding_as_is: bool = False
    """Whether vLLM's class makes its embedding without asking for a quantization method: it stays
    in 16 bits."""
    on_cpu: str = ""
    """What vLLM on a CPU does not do as transformers does, or only in part; "" if nothing."""
    refused: tuple[tuple[str, str], ...] = ()
    """Fields of the decoder's configuration that must not be set, and what they stand for."""
    together: tuple[tuple[str, str], ...] = ()
    """Fields of the decoder's configuration of which transformers goes by the first and vLLM by the
    second: set both, or neither."""
    unread: tuple[str, ...] = ()
    """Tensors, inside a block, that published files have of blocks whose class does not; neither
    transformers nor vLLM reads them there."""
    assumed: tuple[tuple[str, Any], ...] = ()
    """Fields of config.json, or of a part of it (`text_config.x`), that vLLM asks for and
    transformers does not know, with the value that transformers computes by: written where the
    source has none."""

    @property
    def kinds(self) -> tuple[tuple[SmoothingGroup, ...], ...]:
        """The groups of every kind of block."""
        return (self.groups, *self.other_groups)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths, inside a block, of all linears that are quantized; of every kind of block.

        `*` stands for the number of an expert.
        """
        names = (name for groups in self.kinds for group in groups for name in group.linears)
        return tuple(dict.fromkeys(names))

    def groups_of(self, block: Any) -> tuple[SmoothingGroup, ...]:
        """The groups of a block (a module): those of the first kind whose linears are all in it.

        Experts are those of a block whose linears are ordinary ones (experts.unfuse).
        """
        found = {name for name, _ in block.named_modules()}
        experts = len({expert_number(f"{name}.") for name in found} - {None})
        for kind in self.kinds:
            if any("*" in name for group in kind for name in group.linears) != bool(experts):
                continue
            groups = tuple(g for group in kind for g in group.of_experts(experts))
            if all(name in found for group in groups for name in group.linears):
                return groups
        raise ValueError(f"{self.name}: a decoder block of an unknown kind")

    def served_name(self, name: str, tower_type: str | None) -> str:
        """The name by which vLLM loads a tensor of the source; its own nearly always."""
        if tower_type in self.levelled_towers:
            for tower in _TOWERS:
                if name.startswith(tower) and not name.startswith(tower + _LEVEL):
                    return tower + _LEVEL + name.removeprefix(tower)
        for saved, known in self.renamed:
            if name.startswith(saved):
                return known + name.removeprefix(saved)
        return name
