"""`quantization_config` of a qig checkpoint, as vLLM sees it: which layer gets which method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from qig_serve.formats import QUANT_METHOD
from qig_serve.inspection import require_sound
from qig_serve.manifest import PER_BLOCK, read_quantization_config
from qig_serve.vllm_plugin import patches

_registered = False


class QigConfig(QuantizationConfig):
    """Which linears of the model are quantized, and how."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        self.manifest = read_quantization_config(checkpoint, "config.json")
        self.scheme = self.manifest.quant_scheme
        self.ignored = set(self.manifest.ignore)
        self.eight_bit = set(self.manifest.eight_bit)
        # Blocks behind the last, which predict further tokens, are a model of their own in vLLM.
        blocks = (re.search(r"\.(layers\.\d+)$", name) for name in self.manifest.ignore)
        self.ignored |= {f"model.{found[1]}" for found in blocks if found}

    def __repr__(self) -> str:
        return f"QigConfig(scheme={self.scheme.name}, method={self.manifest.method})"

    @classmethod
    def get_name(cls) -> str:
        """The name in config.json."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """fp32 takes the reference path, on the CPU only."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere; vLLM does not ask on the CPU."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QigConfig:
        """Parse `quantization_config`; UserError with one sentence if it is not one."""
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuses a directory whose tensors are not what config.json says: UserError.

        vLLM calls this with its configuration made and no memory taken yet.
        """
        directory = Path(model_name)
        if directory.is_dir():  # and no name on a hub
            require_sound(directory)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add the names that vLLM's modules have to those that the checkpoint's have.

        vLLM calls this for the model and again for the language model inside it. The rules are
        for weights ("lm_head." -> "language_model.lm_head."), hence the suffix. A part of an
        ignored module may be elsewhere in vLLM (MiniCPM-V's merger inside the tower).
        """
        for names in (self.ignored, self.eight_bit):
            for name in sorted(names):
                for mapped in hf_to_vllm_mapper.apply_list([f"{name}.weight"]):
                    names.add(mapped.removesuffix(".weight"))
        for part, moved in hf_to_vllm_mapper.orig_to_new_prefix.items():
            if moved and self._matches(part.removesuffix(".")):
                self.ignored.add(moved.removesuffix("."))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the layer at `prefix` (vLLM's name); None for what stays in 16 bits."""
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from qig_serve.vllm_plugin import experts
        from qig_serve.vllm_plugin.linear import QigLinearMethod

        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if not isinstance(layer, LinearBase | RoutedExperts):
            return None  # attention
        if self.is_ignored(prefix):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        vllm_config = get_current_vllm_config()
        refuse_speculation(vllm_config)
        patches.do_without_a_compiler(vllm_config)
        patches.ask_for_amx()
        patches.lay_heads_flat()
        patches.normalize_pictures()
        patches.keep_adapters_apart()
        dummy = vllm_config.load_config.load_format == "dummy"
        if isinstance(layer, LinearBase):
            return QigLinearMethod(self, prefix, dummy)
        self._refuse_mixed_experts(prefix)
        experts.refuse(vllm_config, layer, prefix)
        return experts.QigExpertsMethod(self, layer.moe_config, prefix, dummy)

    def _refuse_mixed_experts(self, prefix: str) -> None:
        """ValueError where some experts of a layer are left in 16 bits."""
        if some := sorted(name for name in self.ignored if name.startswith(f"{prefix}.")):
            raise ValueError(
                f"{some[0]} is left in 16 bits, but a layer's experts are one in vLLM: quantize "
                "all or none"
            )

    def _vocabulary_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Of an output head or an embedding."""
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from qig_serve.vllm_plugin.embedding import QigEmbeddingMethod

        is_head = isinstance(layer, ParallelLMHead)
        stored = self.manifest.eight_bit_head if is_head else self.manifest.eight_bit_embedding
        if prefix.endswith(PER_BLOCK):
            stored = self.manifest.eight_bit_per_block
        tied = is_head and self.manifest.eight_bit_is_tied
        # Some models give the decoder's embedding no name.
        if not tied and (stored is None or (prefix and prefix not in self.eight_bit)):
            return None
        dummy = get_current_vllm_config().load_config.load_format == "dummy"
        return QigEmbeddingMethod(prefix or str(stored), dummy, tied)

    def is_ignored(self, prefix: str) -> bool:
        """Whether a module (vLLM's name) is left in 16 bits; ValueError if only partly so."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        ignored = [self._matches(f"{parent}.{part}" if parent else part) for part in parts]
        if any(ignored) and not all(ignored):
            raise ValueError(
                f"{prefix}: {', '.join(parts)} are one layer in vLLM, but the checkpoint "
                "quantizes only some of them: quantize all or none"
            )
        return all(ignored)

    def _matches(self, module: str) -> bool:
        return any(module == name or module.startswith(name + ".") for name in self.ignored)


def refuse_speculation(vllm_config: Any) -> None:
    """ValueError where vLLM would answer otherwise with a speculator than without.

    Its gated delta-net on a CPU does not take back the state of tokens that were not accepted.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or vllm_config.speculative_config is None:
        return
    types = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()
    if "linear_attention" in types:
        raise ValueError(
            "vLLM on a CPU gives other tokens when it speculates with a model of gated delta-net: "
            "leave --speculative-config out, or serve it on a GPU"
        )


def register_once() -> None:
    """Register with vLLM, unless this process did already."""
    global _registered
    if not _registered:
        register_quantization_config(QUANT_METHOD)(QigConfig)
        _registered = True
