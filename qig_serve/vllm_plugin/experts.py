"""The method of a mixture of experts: every expert's tensors as the checkpoint has them, stacked.

vLLM's own loader of experts fills the parameters: it finds the expert and the projection in a
tensor's name, leaves out experts of other ranks and cuts the rest for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from qig_serve.formats import TensorSpec, tensor_specs
from qig_serve.kernels import self_check
from qig_serve.kernels.library import ExpertsJob
from qig_serve.vllm_plugin.linear import (
    check_scales,
    check_shape,
    check_tensor,
    keep_prepared,
    kernel_backend,
    prepared,
    refuse_fault,
    take_stored,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from qig_serve.vllm_plugin.config import QigConfig

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""vLLM's name of an expert's part -> the checkpoint's."""
_STACKS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""vLLM's name of a parameter -> its parts along rows."""


def experts_backend() -> ModuleType:
    """The kernels of experts for the platform vLLM runs on."""
    if current_platform.is_cpu():
        from qig_serve.kernels import cpu_experts

        return cpu_experts
    from qig_serve.kernels import experts

    return experts


def refuse(vllm_config: VllmConfig, layer: torch.nn.Module, prefix: str) -> None:
    """ValueError, one sentence, for what vLLM is asked to do and cannot with these experts."""
    moe = layer.moe_config
    if moe.moe_parallel_config.enable_eplb:
        raise ValueError(
            f"{prefix}: quantized experts are not moved between GPUs: leave --enable-eplb out"
        )
    lora = vllm_config.lora_config
    if lora is not None and (lora.target_modules is None or "experts" in lora.target_modules):
        raise ValueError(
            f"{prefix}: LoRA adapters of quantized experts are not served: name the layers that "
            "adapters may have, --lora-target-modules q_proj k_proj v_proj o_proj"
        )
    plain = moe.is_act_and_mul and not moe.has_bias
    if not plain or layer.swiglu_limit is not None or layer.apply_router_weight_on_input:
        raise ValueError(
            f"{prefix}: quantized experts are down(act(gate(x)) * up(x)), without biases and "
            "limits, weighted by the router behind down: these are not"
        )
    if moe.activation.value not in (known := experts_backend().ACTIVATIONS):
        raise ValueError(
            f"{prefix}: quantized experts can have the activation {' or '.join(known)}, and these "
            f"have {moe.activation.value}: leave them in 16 bits"
        )


class QigExpertsMethod(FusedMoEMethodBase):
    """w3a16 and w4a8 experts; one object per layer, which knows the layer's name for messages."""

    def __init__(self, config: QigConfig, moe: Any, prefix: str, dummy: bool = False) -> None:
        """moe: vLLM's FusedMoEConfig; dummy: as QigLinearMethod's."""
        super().__init__(moe)
        self.scheme = config.scheme
        self.activation = str(moe.activation.value)
        self.prefix = prefix
        self.dummy = dummy
        self.linears = kernel_backend()
        self.backend = experts_backend()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        """As they are: the checkpoint's tensors are not padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's own kernels have no part in this."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """w13_* [E, 2 I, ...] and w2_* [E, H, ...] of this rank, shapes from formats.tensor_specs.

        ValueError, one sentence, if a part cannot be stored or no kernel can run it.
        """
        k, inter = hidden_size, intermediate_size_per_partition
        whole = inter * self.moe.moe_parallel_config.tp_size
        for name, n, inputs, of in (
            ("gate_up_proj", 2 * inter, k, k),
            ("down_proj", k, inter, whole),
        ):
            check_shape(
                self.linears, self.scheme, f"{self.prefix}.{name}", n, inputs, of, params_dtype,
                ", or --enable-expert-parallel",
            )  # fmt: skip
        layer.qig_k, layer.qig_inter, layer.qig_dtype = k, inter, params_dtype
        self.backend.compile_ahead(self._job(layer, torch.get_default_device()))
        on_disk = {
            "w1": tensor_specs(self.scheme, whole, k),
            "w3": tensor_specs(self.scheme, whole, k),
            "w2": tensor_specs(self.scheme, k, whole),
        }
        per_group = self.scheme.group_size is not None
        strategy = (
            FusedMoeWeightScaleSupported.GROUP
            if per_group
            else (FusedMoeWeightScaleSupported.CHANNEL)
        )
        for stack, (n, inputs) in {"w13": (2 * inter, k), "w2": (k, inter)}.items():
            for suffix, spec in tensor_specs(self.scheme, n, inputs).items():
                dtype = params_dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
                data = torch.zeros(num_experts, *spec.shape, dtype=dtype)
                parameter = torch.nn.Parameter(data, requires_grad=False)
                specs = {part: on_disk[part][suffix] for part in _STACKS[stack]}
                load = self._checked(extra_weight_attrs["weight_loader"], suffix, specs)
                set_weight_attrs(parameter, {"weight_loader": load, "quant_method": strategy.value})
                layer.register_parameter(f"{stack}_{suffix}", parameter)

    def _checked(
        self, load: Callable[..., Any], suffix: str, specs: dict[str, TensorSpec]
    ) -> Callable[..., Any]:
        """vLLM's loader of experts, refusing a tensor that is not what the format stores."""

        def checked(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> Any:
            name, spec = self._name(expert_id, shard_id), specs[shard_id]
            check_tensor(loaded_weight, f"{name}.{suffix}", spec)
            if len(loaded_weight) != spec.shape[0]:
                raise ValueError(
                    f"{name}.{suffix}: the checkpoint has {len(loaded_weight)} rows, expected "
                    f"{spec.shape[0]}: the shard is damaged or of another model"
                )
            return load(
                param, loaded_weight, weight_name, shard_id=shard_id, expert_id=expert_id,
                return_success=return_success,
            )  # fmt: skip

        return checked

    def _name(self, expert: int, part: str) -> str:
        return f"{self.prefix}.{expert}.{PROJECTIONS[part]}"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the checkpoint's tensors by the kernels' own, and compile what they need.

        ValueError, one sentence, for scales that are none, and for kernels that compute otherwise.
        """
        device = getattr(layer, f"w2_{self.scheme.suffixes[0]}").device
        job = self._job(layer, device)
        fault, some = "" if self.dummy else self_check.known(job), None
        if fault is None:
            some = (
                self._first_experts(layer, "w13", job.top_k),
                self._first_experts(layer, "w2", job.top_k),
            )
        for stack, parts in _STACKS.items():
            keep_prepared(layer, self._prepared(layer, stack, parts), f"qig_{stack}")
        self.backend.warm_up(job)
        if some is not None:
            counts = self.backend.token_counts(job)
            fault = self_check.fault_of_experts(
                job, some, counts, lambda *given: self._run(layer, *given)
            )
            self_check.keep(job, fault)
        refuse_fault(self.prefix, fault)

    def _first_experts(
        self, layer: torch.nn.Module, stack: str, most: int
    ) -> list[dict[str, torch.Tensor]]:
        """The first of this rank, as stored."""
        stored = {suffix: getattr(layer, f"{stack}_{suffix}") for suffix in self.scheme.suffixes}
        local = len(stored["weight_scale"])
        return [
            {suffix: tensor.data[expert].clone() for suffix, tensor in stored.items()}
            for expert in range(min(most, local))
        ]

    def _prepared(
        self, layer: torch.nn.Module, stack: str, parts: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """The kernels' tensors of every local expert, stacked; the checkpoint's are let go."""
        tensors = take_stored(layer, self.scheme, self.dummy, f"{stack}_")
        ids = self._ids(layer, len(tensors["weight_scale"]))
        found = []
        for place, expert in enumerate(ids):
            own = {suffix: tensor[place] for suffix, tensor in tensors.items()}
            for part, scale in zip(parts, own["weight_scale"].chunk(len(parts)), strict=True):
                check_scales(scale, self._name(expert, part))
            found.append(self.linears.prepare(self.scheme, own, layer.qig_dtype))
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _ids(self, layer: torch.nn.Module, local: int) -> list[int]:
        """The model's numbers of this rank's experts."""
        if layer.expert_map is None:
            return list(range(local))
        places = layer.expert_map.tolist()
        return [places.index(place) for place in range(local)]

    def _job(self, layer: torch.nn.Module, device: torch.device) -> ExpertsJob:
        return ExpertsJob(
            self.scheme.name, layer.qig_k, layer.qig_inter, self.moe.num_local_experts,
            self.moe.experts_per_token, self.activation, layer.qig_dtype, device,
        )  # fmt: skip

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> torch.Tensor:
        """x [M, H], routing [M, top_k] -> [M, H]: this rank's experts, not yet summed over ranks.

        Shared experts are run by vLLM, before.
        """
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return self._run(layer, x, topk_weights, topk_ids)

    def _run(
        self, layer: torch.nn.Module, x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """`apply`, with this rank's numbers of experts."""
        gate_up, down = (prepared(layer, f"qig_{stack}") for stack in _STACKS)
        return self.backend.apply(
            self.scheme.name, x, routing, ids, gate_up, down, layer.qig_inter, self.activation,
        )  # fmt: skip
