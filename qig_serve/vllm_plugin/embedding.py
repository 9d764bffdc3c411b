"""The method of output head and embedding in 8 bits: vLLM's ParallelLMHead, VocabParallelEmbedding.

A tied model has one table. Its head makes no parameters: vLLM ties it by handing over the
embedding's `weight` (ParallelLMHead.tie_weights, in later versions the method's own), which here is
an empty tensor that knows its layer, and the head computes with that layer's table.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from qig_serve.formats import VOCABULARY_SCHEME, tensor_specs
from qig_serve.kernels import self_check
from qig_serve.kernels.library import LinearJob
from qig_serve.packing import unpack_rows
from qig_serve.vllm_plugin.linear import (
    check_scales,
    checked,
    device_capability,
    keep_prepared,
    kernel_backend,
    prepared,
    take_stored,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

_logger = logging.getLogger("vllm.qig_serve.embedding")  # under vLLM's, whose handlers it has
_WIDE = "weight"  # name of a table that is held in 16 bits
_WARM_ROWS = 8192  # kernels do not depend on the number of rows: no zeros for a whole vocabulary


class QigEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Output head or embedding in formats.VOCABULARY_SCHEME; one object per layer."""

    scheme = VOCABULARY_SCHEME

    def __init__(self, prefix: str, dummy: bool = False, tied: bool = False) -> None:
        """dummy: vLLM fills the weights with small random numbers. tied: a head without a table."""
        self.prefix = prefix
        self.dummy = dummy
        self.tied = tied
        self.backend = kernel_backend()

    def create_weights(
        self, layer: torch.nn.Module, input_size_per_partition: int,
        output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Parameters of this rank's rows, shapes from formats.tensor_specs.

        ValueError, one sentence, if no kernel can run them.
        """
        n, k = sum(output_partition_sizes), input_size_per_partition
        layer.qig_n, layer.qig_k, layer.qig_dtype = n, k, params_dtype
        possible, why_not = self.backend.can_implement(
            self.scheme, n, k, params_dtype, device_capability()
        )
        if not possible:
            raise ValueError(f"{self.prefix}: {why_not}")
        if self.tied:
            return
        self._compile(layer, self.backend.compile_ahead, torch.get_default_device())
        for suffix, spec in tensor_specs(self.scheme, n, k).items():
            data = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
            parameter = torch.nn.Parameter(data, requires_grad=False)
            load = checked(extra_weight_attrs["weight_loader"], f"{self.prefix}.{suffix}", spec)
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, "weight_loader": load})
            layer.register_parameter(suffix, parameter)
        self._set_handle(layer, data.device)

    def _set_handle(self, layer: torch.nn.Module, device: torch.device) -> None:
        handle: Any = torch.empty(0, dtype=layer.qig_dtype, device=device)
        handle.qig_layer = layer
        layer.weight = handle

    def _job(self, layer: torch.nn.Module, n: int, device: torch.device) -> LinearJob:
        has_bias = getattr(layer, "bias", None) is not None
        return LinearJob(self.scheme, n, layer.qig_k, layer.qig_dtype, device, has_bias)

    def _compile(self, layer: torch.nn.Module, how: Any, device: torch.device) -> None:
        how(self._job(layer, min(layer.qig_n, _WARM_ROWS + layer.qig_n % 16), device))

    def tie_weights(
        self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding
    ) -> torch.nn.Module:
        """What vLLM's default does, too: the head gets the embedding's handle."""
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the checkpoint's tensors by the kernels' own, and compile what they need.

        Where the kernels compute otherwise than the checkpoint says, the table is held in 16 bits.
        """
        if self.tied:
            if not hasattr(getattr(layer, "weight", None), "qig_layer"):
                raise ValueError(
                    f"{self.prefix}: the checkpoint has no tensors for the output head, and "
                    "config.json does not tie it to an embedding in 8 bits: quantize again"
                )
            return
        tensors = take_stored(layer, self.scheme, self.dummy)
        rows = getattr(layer, "num_org_embeddings_per_partition", layer.qig_n)  # padding follows
        check_scales(tensors["weight_scale"][:rows], self.prefix)
        device = tensors["weight_packed"].device
        keep_prepared(layer, self.backend.prepare(self.scheme, tensors, layer.qig_dtype))
        self._set_handle(layer, device)
        self._compile(layer, self.backend.warm_up, device)
        if not self.dummy and (fault := self._fault(layer, tensors, device)):
            _logger.warning("%s is held in 16 bits: %s.", self.prefix, fault)
            for name in layer.qig_names:
                delattr(layer, f"qig_{name}")
            wide = unpack_rows(tensors, self.scheme, layer.qig_dtype)
            keep_prepared(layer, {_WIDE: wide})

    def _fault(
        self, layer: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device
    ) -> str:
        """What self_check.py finds; empty if nothing."""
        job = self._job(layer, layer.qig_n, device)
        if (fault := self_check.known(job)) is not None:
            return fault
        rows, counts = self_check.Rows(tensors), self.backend.token_counts(job)
        fault = self_check.fault_of_linear(job, rows, counts, lambda x: self.apply(layer, x))
        fault = fault or self_check.fault_of_lookup(
            job, rows, lambda ids: self.embedding(layer, ids)
        )
        return self_check.keep(job, fault)

    def _table(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return prepared(layer.weight.qig_layer if self.tied else layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits: x [..., K] -> [..., N]."""
        table = self._table(layer)
        if _WIDE in table:
            return F.linear(x, table[_WIDE], bias)
        return self.backend.linear(self.scheme, x, table, layer.qig_n, layer.qig_k, bias)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> [..., K]."""
        table = self._table(layer)
        if _WIDE in table:
            return F.embedding(input_, table[_WIDE])
        return self.backend.embedding(
            self.scheme, input_, table, layer.qig_n, layer.qig_k, layer.qig_dtype
        )
