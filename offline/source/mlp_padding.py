"""Channels of zeros behind an MLP's own, so that tensor parallelism can share it out.

Tensor parallelism cuts the inputs of down at whole groups. Qwen2.5-VL-72B has 29,568 of them, 231
groups, which no two devices can share; with 128 channels of zeros behind them there are 232, for 2,
4 and 8. A row of zeros in gate and up makes a channel that is zero, whatever the activation
function, and a column of zeros in down does not read it: the model computes what it did.

The channels are added to what a block is stored as. Calibration, search and rounding see the block
as it was published: no statistic, scale or code of it depends on the padding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qig_serve.formats import QuantScheme
from qig_serve.packing import pack


@dataclass(frozen=True)
class MlpPadding:
    """How much wider the MLP is stored than it was published."""

    width: int
    """Channels of the source."""
    padded: int
    """Channels of the checkpoint."""
    rows: frozenset[str]
    """Linears of a block that make the channels: gate and up, or both in one."""
    columns: frozenset[str]
    """Linears of a block that read them: down."""

    def sentence(self) -> str:
        """For people."""
        return (
            f"the MLP's {self.width} channels are stored with {self.padded - self.width} of zeros "
            f"behind them, {self.padded} in all, which tensor parallelism can share out; what the "
            "model computes is unchanged (--no-pad-mlp leaves them out)"
        )

    def packed(
        self, linear: str, parts: Mapping[str, torch.Tensor], scheme: QuantScheme
    ) -> dict[str, torch.Tensor]:
        """The tensors of packing.pack_linear of a block's linear, as they are stored."""
        if linear in self.rows:
            return {
                suffix: self.wider(part, 1 if suffix == "weight_scale" else 0)
                for suffix, part in parts.items()
            }
        return self._more_columns(parts, scheme) if linear in self.columns else dict(parts)

    def wider(self, rows: torch.Tensor, value: int = 0) -> torch.Tensor:
        """Rows [W, ...] of gate or up, or [2 W, ...] of both, with rows of `value` behind each."""
        both = rows.unflatten(0, (-1, self.width))
        more = both.new_full((len(both), self.padded - self.width, *rows.shape[1:]), value)
        return torch.cat([both, more], dim=1).flatten(0, 1)

    def narrower(self, linear: str, tensor: torch.Tensor) -> torch.Tensor:
        """Of a stored weight or bias what the source has: the inverse of the above."""
        if linear in self.rows:
            return tensor.unflatten(0, (-1, self.padded))[:, : self.width].flatten(0, 1)
        return tensor[:, : self.width] if linear in self.columns else tensor

    def _more_columns(
        self, parts: Mapping[str, torch.Tensor], scheme: QuantScheme
    ) -> dict[str, torch.Tensor]:
        found = dict(parts)
        added = self.padded - self.width
        found["weight_packed"] = F.pad(parts["weight_packed"], (0, added * scheme.bits // 32))
        if scheme.group_size is None:
            return found
        more = scheme.num_groups(self.padded) - scheme.num_groups(self.width)
        found["weight_scale"] = F.pad(parts["weight_scale"], (0, more), value=1)
        if (zero := parts.get("weight_zero_point")) is not None:
            found["weight_zero_point"] = F.pad(zero, (0, more))
            # In a last group that was not full, the code of a zero is the group's zero point.
            if inside := min(-self.width % scheme.group_size, added):
                codes = pack(zero[:, -1:].repeat(1, inside), scheme.bits)
                start = self.width * scheme.bits // 32
                found["weight_packed"][:, start : start + codes.shape[1]] = codes
        return found

    def config(self, config: Any) -> Any:
        """A copy of a model's Hugging Face configuration with the wider MLP."""
        config = copy.deepcopy(config)
        config.get_text_config().intermediate_size = self.padded
        return config

    def entries(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in a config.json."""
        width, found = "intermediate_size", dict[str, Any]()
        text = raw.get("text_config")
        if isinstance(text, dict):
            found["text_config"] = {**text, width: self.padded}
        if not isinstance(text, dict) or raw.get(width) == self.width:
            found[width] = self.padded
        return found
