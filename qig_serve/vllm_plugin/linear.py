"""The linear method: parameters as the checkpoint has them, then the kernels' own layout."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform

from qig_serve.formats import QuantScheme, TensorSpec, tensor_specs
from qig_serve.kernels import self_check
from qig_serve.kernels.library import LinearJob
from qig_serve.tensor_parallel import sizes_for_inputs

if TYPE_CHECKING:
    from qig_serve.vllm_plugin.config import QigConfig

_SMALLEST_SCALE = 1e-6  # of dummy weights


def kernel_backend() -> ModuleType:
    """The kernels of the platform vLLM runs on; RuntimeError if there are none for it."""
    if current_platform.is_cpu():
        from qig_serve.kernels import cpu

        return cpu
    if current_platform.is_cuda():
        from qig_serve.kernels import ops

        return ops
    raise RuntimeError(
        f"qig-serve has kernels for CUDA and for CPUs, not for {current_platform.device_name}"
    )


def kernel_name(scheme: QuantScheme, n: int, dtype: torch.dtype) -> str:
    """What runs a linear of n rows on the platform vLLM runs on, in words."""
    if current_platform.is_cpu():
        from qig_serve.kernels import cpu

        return cpu.kernel_name(scheme, n, dtype)
    return f"Triton {scheme.name}"


def device_capability() -> tuple[int, int] | None:
    """Of the GPU that vLLM runs on; None on a CPU."""
    capability = current_platform.get_device_capability()
    return None if capability is None else (capability.major, capability.minor)


@register_weight_loader_v2_supported_method
class QigLinearMethod(LinearMethodBase):
    """w3a16 and w4a8 linears; one object per layer, which knows the layer's name for messages."""

    def __init__(self, config: QigConfig, prefix: str, dummy: bool = False) -> None:
        """dummy: vLLM fills the weights with small random numbers (--load-format dummy)."""
        self.dummy = dummy
        self.scheme: QuantScheme = config.scheme
        self.prefix = prefix
        self.backend = kernel_backend()
        if current_platform.is_cuda() and self.backend.fuses_activations(self.scheme):
            from qig_serve.vllm_plugin import fusion

            fusion.install(get_current_vllm_config())

    def create_weights(
        self, layer: torch.nn.Module, input_size_per_partition: int,
        output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Parameters of this rank's part, shapes from formats.tensor_specs.

        ValueError, one sentence, if the part cannot be stored or no kernel can run it.
        """
        n, k = sum(output_partition_sizes), input_size_per_partition
        check_shape(self.backend, self.scheme, self.prefix, n, k, input_size, params_dtype)
        layer.qig_n, layer.qig_k, layer.qig_dtype = n, k, params_dtype
        # While weights are read. Parameters are made on the device that vLLM has set.
        job = LinearJob(self.scheme, n, k, params_dtype, torch.get_default_device())
        self.backend.compile_ahead(job)

        on_disk = tensor_specs(self.scheme, n, input_size)
        for suffix, spec in tensor_specs(self.scheme, n, k).items():
            dtype = params_dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
            data = torch.zeros(spec.shape, dtype=dtype)
            load = checked(
                extra_weight_attrs["weight_loader"], f"{self.prefix}.{suffix}", on_disk[suffix]
            )
            if suffix == "weight_packed":
                parameter = PackedvLLMParameter(
                    data=data,
                    input_dim=1,
                    output_dim=0,
                    packed_dim=1,
                    packed_factor=self.scheme.packed_factor,
                    weight_loader=load,
                )
            elif self.scheme.group_size is None:
                parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)
            else:
                parameter = GroupQuantScaleParameter(
                    data=data, input_dim=1, output_dim=0, weight_loader=load
                )
            layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the checkpoint's tensors by the kernels' own, and compile what they need.

        ValueError, one sentence, for scales that are none, and for kernels that compute otherwise.
        """
        tensors = take_stored(layer, self.scheme, self.dummy)
        check_scales(tensors["weight_scale"], self.prefix)
        device = tensors["weight_packed"].device
        has_bias = getattr(layer, "bias", None) is not None
        job = LinearJob(self.scheme, layer.qig_n, layer.qig_k, layer.qig_dtype, device, has_bias)
        fault = "" if self.dummy else self_check.known(job)
        rows = self_check.Rows(tensors) if fault is None else None
        keep_prepared(layer, self.backend.prepare(self.scheme, tensors, layer.qig_dtype))
        del tensors
        # vLLM's LoRA layers ask a tensor of one of their known names where the layer lies.
        layer.weight_packed = torch.empty(0, dtype=torch.int32, device=device)
        self.backend.warm_up(job)
        if rows is not None:
            counts = self.backend.token_counts(job)
            fault = self_check.fault_of_linear(job, rows, counts, lambda x: self.apply(layer, x))
            self_check.keep(job, fault)
        refuse_fault(self.prefix, fault)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        return self.backend.linear(self.scheme, x, prepared(layer), layer.qig_n, layer.qig_k, bias)


def refuse_fault(name: str, fault: str | None) -> None:
    """ValueError where self_check.py found one: what would be served is not the checkpoint."""
    if fault:
        raise ValueError(
            f"{name}: {fault}: quantize with --format compressed-tensors, for vLLM's own kernels, "
            "and report this with what `qig-serve doctor` says"
        )


def take_stored(
    layer: torch.nn.Module, scheme: QuantScheme, dummy: bool, before: str = ""
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of a layer by suffix, which it no longer holds afterwards.

    dummy: vLLM has filled them with small random numbers. before: what stands before the suffixes.
    """
    tensors = {}
    for suffix in scheme.suffixes:
        tensors[suffix] = getattr(layer, before + suffix).data
        delattr(layer, before + suffix)
    if dummy:  # scales of either sign, which no kernel has to understand
        tensors["weight_scale"] = tensors["weight_scale"].abs().clamp_min(_SMALLEST_SCALE)
    return tensors


def keep_prepared(
    layer: torch.nn.Module, tensors: dict[str, torch.Tensor], before: str = "qig"
) -> None:
    """Gives a layer the kernels' tensors, as parameters whose names begin with `before`."""
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(f"{before}_{name}", parameter)
    setattr(layer, f"{before}_names", tuple(tensors))


def prepared(layer: torch.nn.Module, before: str = "qig") -> dict[str, torch.Tensor]:
    """What `keep_prepared` gave."""
    return {name: getattr(layer, f"{before}_{name}") for name in getattr(layer, f"{before}_names")}


def check_shape(
    backend: ModuleType,
    scheme: QuantScheme,
    name: str,
    n: int,
    k: int,
    input_size: int,
    dtype: torch.dtype,
    otherwise: str = "",
) -> None:
    """ValueError, one sentence, unless a rank's part [n, k] of `input_size` inputs can be run.

    otherwise: what else would help against a split that is not possible.
    """
    multiple = scheme.cut_multiple
    if k != input_size and k % multiple:
        sizes = " or ".join(map(str, sizes_for_inputs(input_size, multiple)))
        raise ValueError(
            f"{name}: {input_size} inputs split {input_size // k} ways: "
            f"{scheme.name} is cut at multiples of {multiple} inputs, and a part would "
            f"have {k}; use a tensor-parallel size of {sizes}{otherwise}"
        )
    possible, why_not = backend.can_implement(scheme, n, k, dtype, device_capability())
    if not possible:
        raise ValueError(f"{name}: {why_not}")


def check_scales(scale: torch.Tensor, name: str) -> None:
    """ValueError, one sentence, unless all are positive: those that were not loaded are zeros."""
    if not bool((scale > 0).all()):
        raise ValueError(
            f"{name}.weight_scale: the checkpoint has no scales for this layer, or "
            "some are not positive: it is damaged; try `qig-serve inspect --verify`"
        )


def check_tensor(loaded: torch.Tensor, name: str, spec: TensorSpec) -> None:
    """ValueError, one sentence, for another dtype or row length than the format stores.

    vLLM would cast the one in silence and stop at a bare assertion on the other.
    """
    wanted = "a float dtype" if spec.dtype == "model" else spec.dtype
    fits = (
        loaded.is_floating_point()
        if spec.dtype == "model"
        else (loaded.dtype == getattr(torch, spec.dtype))
    )
    if not fits or loaded.dim() != 2 or loaded.shape[1] != spec.shape[1]:
        raise ValueError(
            f"{name}: the checkpoint has {loaded.dtype} {list(loaded.shape)}, expected "
            f"{wanted} with {spec.shape[1]} columns: the shard is damaged or of another format"
        )


def checked(load: Callable[..., None], name: str, spec: TensorSpec) -> Callable[..., None]:
    """`load`, after `check_tensor`."""

    def checked(
        parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        check_tensor(loaded, name, spec)
        load(parameter, loaded, *args, **kwargs)

    return checked
