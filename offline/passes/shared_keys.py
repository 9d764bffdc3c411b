"""Keys and values that later blocks read, and the gradients that come back to them from there."""

from __future__ import annotations

from collections import UserDict, defaultdict
from collections.abc import Mapping, Sequence

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class TrackedKeys(UserDict[str, Pair]):
    """What one run of a block reads and notes of them, in the place of the mapping it is given."""

    def __init__(self, given: Mapping[str, Pair], device: torch.device) -> None:
        """given: attention's kind -> keys and values as the forward pass left them."""
        super().__init__()
        self._given = given
        self._device = device
        self.read: dict[str, Pair] = {}
        """Of these, those that the block took: leaves that require gradients."""
        self.noted = self.data
        """What the block noted, with the graph behind it."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Those of `read`, one after the other."""
        return [states for pair in self.read.values() for states in pair]

    def __getitem__(self, kind: str) -> Pair:
        if kind not in self.read:
            keys, values = self._given[kind]
            self.read[kind] = (self._leaf(keys), self._leaf(values))
        return self.read[kind]

    def _leaf(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self._device).detach().requires_grad_()


class KeyGradients:
    """Gradients of one batch's shared keys and values, summed over the blocks that read them."""

    def __init__(self) -> None:
        self._found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def of_noted(self, tracked: TrackedKeys) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a block noted and later ones read, and the gradients of that."""
        read = [kind for kind in tracked.noted if kind in self._found]
        outputs = [states for kind in read for states in tracked.noted[kind]]
        return outputs, [gradient for kind in read for gradient in self._found[kind]]

    def add(self, tracked: TrackedKeys, gradients: Sequence[torch.Tensor]) -> None:
        """Adds those of what a block read, in the order of `tracked.read`."""
        for place, kind in enumerate(tracked.read):
            pair = gradients[2 * place : 2 * place + 2]
            known = self._found[kind]
            self._found[kind] = [a + b for a, b in zip(known or (0, 0), pair, strict=True)]
