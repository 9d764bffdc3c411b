"""Checkpoints on disk as models of dequantized weights, one block at a time: a class per form.

Each is read by what its own files say, as a stranger would; what is missing or not known is
refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve import model_directory
from qig_serve.architectures import get_architecture
from qig_serve.errors import UserError
from qig_serve.family_row import any_expert
from qig_serve.formats import QuantScheme
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.source.loaded_model import LoadedModel, load_front
from qig_serve.offline.source.surplus import (
    check_block,
    check_number_of_blocks,
    check_outside,
    check_prefix,
)
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.packing import unpack_linear


class WrittenModel(LoadedModel):
    """A checkpoint in our form, its blocks still on disk; `block` gives dequantized weights."""

    activation_bits: int | None
    suffixes: Collection[str]
    """What stands for the weight of a quantized linear."""
    tolerance = 0.01
    """Relative error allowed: none on the CPU that wrote it; on a GPU sums may differ."""
    _scheme: QuantScheme

    @classmethod
    def open(
        cls, directory: Path, processor: Any, device: torch.device | str = "cpu"
    ) -> WrittenModel:
        """UserError unless all tensors that the model has are there, and no others."""
        arch = get_architecture(model_directory.read_model_type(directory))
        config = cls._config(directory)
        model, info = load_front(directory, config)
        inside = (*arch.source_prefixes, f"{arch.decoder}.layers.")  # looked at in _check_blocks
        missing = sorted(n for n in info["missing_keys"] if not n.startswith(inside))
        if missing:
            raise UserError(f"the written checkpoint has no tensor {missing[0]}")
        source = SourceCheckpoint(directory)
        check_outside(source, (n for n in info["unexpected_keys"] if not n.startswith(inside)))
        device = torch.device(device)
        model = model.to(device).eval().requires_grad_(False)
        return cls(directory, arch, config, processor, source, model, device)

    @classmethod
    def _config(cls, directory: Path) -> Any:
        import qig_serve.transformers_plugin  # noqa: F401 - what reads our form

        return model_directory.load_config(directory)

    def _read_form(self) -> None:
        """Sets what config.json says of the quantization."""
        self._scheme = model_directory.read_manifest(self.directory).quant_scheme
        self.activation_bits = self._scheme.activation_bits
        self.suffixes = self._scheme.suffixes

    def _weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return unpack_linear(dict(parts), self._scheme)

    def _check_blocks(self) -> None:
        """UserError unless the blocks hold what their class and their scheme ask for."""
        self._read_form()
        check_prefix(self.source, self.source_prefix)
        count = self.num_blocks
        check_number_of_blocks(self.source, self.source_prefix, count, self.blocks_behind)
        for index in range(self.num_blocks):
            block = self.meta_block(index)
            linears = [name for group in self.groups(block) for name in group.linears]
            names = set(block.state_dict()) - {f"{name}.weight" for name in linears}
            names |= {f"{name}.{suffix}" for name in linears for suffix in self.suffixes}
            check_block(self.source, self.source_name(index, ""), names)

    def _empty_block(self, index: int) -> nn.Module:
        return self.meta_block(index)

    def _stored(self, index: int, name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if any_expert(linear) not in self.arch.linears or not name.endswith(".weight"):
            return self.source.tensor(self.source_name(index, name))
        parts = {
            suffix: self.source.tensor(self.source_name(index, f"{linear}.{suffix}"))
            for suffix in self.suffixes
        }
        return self._weight(parts)


class CompressedModel(WrittenModel):
    """The same in the form of compressed-tensors."""

    _group: Mapping[str, Any]

    @classmethod
    def _config(cls, directory: Path) -> Any:
        config = model_directory.load_config(directory)
        del config.quantization_config  # transformers would ask for the library
        return config

    def _read_form(self) -> None:
        config = model_directory.read_config(self.directory)["quantization_config"]
        names = [f"{self.arch.decoder}.layers.0.{linear}" for linear in self.arch.linears]
        self._group = compressed_tensors.group_of(config, names)
        inputs = self._group["input_activations"]
        self.activation_bits = inputs and inputs["num_bits"]
        self.suffixes = ["weight_packed", "weight_scale", "weight_shape"]
        if not self._group["weights"]["symmetric"]:
            self.suffixes.append("weight_zero_point")

    def _weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return compressed_tensors.decompress(parts, self._group["weights"])


class PlainModel(WrittenModel):
    """Ordinary weights, rounded to the source's dtype."""

    tolerance = 0.05

    def _read_form(self) -> None:
        self.activation_bits = None
        self.suffixes = ["weight"]

    def _weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"]
