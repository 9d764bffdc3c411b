"""The finished blocks while their scales are tuned: packed, and unpacked one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qig_serve.formats import QuantScheme
from qig_serve.offline.checkpoint.blocks import load_written
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.processes import Ranks
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.packing import grouped, ungrouped, unpack_linear


class KeptBlock:
    """A block without the weights of its linears, and what stands for these in the checkpoint."""

    def __init__(
        self,
        loaded: LoadedModel,
        index: int,
        writer: CheckpointWriter | None,
        scheme: QuantScheme,
        ranks: Ranks,
    ) -> None:
        """Reads block `index` back from the writer's shard; the processes without one get it."""
        written = {} if writer is None else writer.block(index)
        tensors = ranks.broadcast_object(written)
        self.block = loaded.block(index)
        load_written(loaded, self.block, index, tensors, scheme)
        prefix = loaded.source_name(index, "")
        packed, _ = packed_linears(tensors)
        self.packed = {name.removeprefix(prefix): parts for name, parts in packed.items()}
        self.linears = [self.block.get_submodule(name) for name in self.packed]
        """In the order of `packed`."""
        self.scheme, self.ranks = scheme, ranks
        self.untuned = {name: parts["weight_scale"] for name, parts in self.packed.items()}
        self.factors: dict[str, nn.Parameter] = {}
        """Name of a linear -> what its scales are multiplied by, less 1; fp32 [N, G], host."""
        for name, linear in zip(self.packed, self.linears, strict=True):
            scale = self.packed[name]["weight_scale"]
            self.factors[name] = nn.Parameter(torch.zeros(scale.shape, dtype=torch.float32))
            linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # given at each call
            if (bias := tensors.get(f"{prefix}{name}.bias")) is not None:  # of a padded MLP, wider
                bias = bias.to(loaded.device, torch.float32)
                linear.bias = nn.Parameter(bias, requires_grad=False)

    def rounded(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Name -> the rounded weight fp32 [N, K] as it was before tuning."""
        found = {}
        for name, parts in self.packed.items():
            moved = {suffix: tensor.to(device) for suffix, tensor in parts.items()}
            found[name] = unpack_linear(moved, self.scheme)
        return found

    def weights(self, rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name of the parameter -> the weight fp32 [N, K] with the scales of the moment."""
        found = {}
        for name, weight in rounded.items():
            factor = 1 + self.factors[name].detach().to(weight.device)
            scaled = grouped(weight, factor.shape[1]) * factor[..., None]
            found[f"{name}.weight"] = ungrouped(scaled, weight.shape[1])
        return found

    def add_gradient(self, name: str, rounded: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds to the factors' gradient, from that of the weight [N, K] in this process."""
        factor = self.factors[name]
        found = grouped(rounded * gradient, factor.shape[1]).sum(-1)
        self.ranks.sum(found)
        found = found.cpu()
        factor.grad = found if factor.grad is None else factor.grad.add_(found)

    def scales(self) -> dict[str, torch.Tensor]:
        """Name of a linear -> its scales times the factors, in the dtype that is stored."""
        found = {}
        for name, parts in self.packed.items():
            scale = parts["weight_scale"]
            tuned = scale.float() * (1 + self.factors[name].detach())
            found[name] = tuned.to(scale.dtype)
        return found

    def settle(self) -> None:
        """The scales as they are stored take the place of the old ones; factors are 1 again."""
        self._set(self.scales())

    def undo(self) -> None:
        """The scales are again what they were before tuning."""
        self._set(self.untuned)

    def _set(self, scales: Mapping[str, torch.Tensor]) -> None:
        for name, scale in scales.items():
            self.packed[name] = {**self.packed[name], "weight_scale": scale}
            self.factors[name].data.zero_()
