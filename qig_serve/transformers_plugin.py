"""qig checkpoints in plain transformers, dequantized: for evaluation, not for speed.

    import qig_serve.transformers_plugin
    model = AutoModelForImageTextToText.from_pretrained(DIR)

The weights become ordinary linears in the dtype asked for. With w4a8 the inputs of the quantized
linears are int8-quantized per token, as the served model does, so logits agree up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qig_serve.errors import UserError
from qig_serve.experts import unfuse
from qig_serve.formats import QUANT_METHOD, VOCABULARY_SCHEME, QuantScheme, tensor_specs
from qig_serve.manifest import QuantizationConfig, read_quantization_config
from qig_serve.packing import fake_quantize_activation, unpack_linear, unpack_rows


class PackedLinear(nn.Module):
    """Holds what the checkpoint stores of one linear until it is dequantized."""

    def __init__(self, linear: nn.Linear, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, spec in tensor_specs(scheme, self.out_features, self.in_features).items():
            # "model": whatever floating dtype the loader chooses; scales are cast like weights.
            dtype = linear.weight.dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
            empty = torch.empty(spec.shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = linear.bias

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear with the weight that the codes stand for."""
        tensors = {n: p.data for n, p in self.named_parameters() if n != "bias"}
        weight = unpack_linear(tensors, self.scheme).to(dtype)
        kind = nn.Linear if self.scheme.activation_bits is None else QuantizedInputLinear
        with torch.device("meta"):
            linear = kind(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear


class QuantizedInputLinear(nn.Linear):
    """A linear whose input [..., K] is int8-quantized and dequantized, one scale per token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(fake_quantize_activation(input))


class PackedVocabulary:
    """Output head and embeddings, holding what the checkpoint stores of them until `dequantize`.

    The modules stay those of the model, which may be classes of its own; their weight is taken out
    for as long.
    """

    def __init__(self, model: Any, manifest: QuantizationConfig) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        named = ((embedding, manifest.eight_bit_embedding), (head, manifest.eight_bit_head))
        self.packed: list[Any] = [module for module, name in named if name]
        if name := manifest.eight_bit_per_block:
            self.packed.append(model.get_submodule(name))
        self.tied = (head, embedding) if manifest.eight_bit_is_tied else None
        self.model, self.tied_names = model, model.all_tied_weights_keys
        if self.tied:
            head.weight = None
            head._is_hf_initialized = True
            model.all_tied_weights_keys = {}  # transformers would look for what is not there
        for module in self.packed:
            n, k = module.weight.shape
            module.weight = None
            module._is_hf_initialized = True
            for suffix, spec in tensor_specs(VOCABULARY_SCHEME, n, k).items():
                empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
                module.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))

    def dequantize(self, dtype: torch.dtype) -> None:
        """Give the modules the weights that the codes stand for."""
        for module in self.packed:
            suffixes = VOCABULARY_SCHEME.suffixes
            tensors = {suffix: getattr(module, suffix).data for suffix in suffixes}
            for suffix in suffixes:
                delattr(module, suffix)
            weight: Any = nn.Parameter(
                unpack_rows(tensors, VOCABULARY_SCHEME, dtype), requires_grad=False
            )
            weight._is_hf_initialized = True
            module.weight = weight
            self.model._init_weights(module)  # what it computes itself, as Gemma's scale
        if self.tied:
            self.tied[0].weight = self.tied[1].weight
        self.model.all_tied_weights_keys = self.tied_names


class QigQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a qig checkpoint, as transformers holds it."""

    def __init__(self, **fields: Any) -> None:
        read_quantization_config(fields, "config.json")
        self.__dict__.update(fields)


class QigQuantizer(HfQuantizer):
    """Loads packed tensors, then replaces each by its dequantized linear."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        manifest = read_quantization_config(self.quantization_config.to_dict(), "config.json")
        unfuse(model)
        for name, linear in decoder_linears(model).items():
            _replace(model, name, PackedLinear(linear, manifest.quant_scheme))
        self.vocabulary = PackedVocabulary(model, manifest)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dtype = model.config.dtype  # the one asked for
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                _replace(model, name, module.dequantized(dtype))
        self.vocabulary.dequantize(dtype)
        for parameter in model.parameters():  # loaded as stored; scales had to be
            parameter.data = parameter.data.to(dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Those of transformers, less what would make fused experts of single ones."""
        return [
            conversion
            for conversion in weight_conversions
            if not any("experts" in pattern for pattern in conversion.source_patterns)
        ]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False  # the packed tensors are gone

    @property
    def is_trainable(self) -> bool:
        return False


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the language model's decoder blocks, by name: what qig quantizes."""
    from qig_serve.architectures import get_architecture
    from qig_serve.family_row import any_expert

    arch = get_architecture(model.config.model_type)
    inside, linears = arch.decoder + ".layers.", set(arch.linears)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inside)
        and any_expert(name.removeprefix(inside).partition(".")[2]) in linears
        and isinstance(module, nn.Linear)
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def load_dequantized(directory: Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a qig checkpoint in eval mode, all weights in `dtype`. UserError if unusable."""
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory} cannot be loaded: {error}") from None
    if info["missing_keys"]:
        raise UserError(f"{directory} lacks the tensor {sorted(info['missing_keys'])[0]}")
    return model.eval()


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(QigQuantizationConfig)
    register_quantizer(QUANT_METHOD)(QigQuantizer)
