"""The CPU path, on kernels that torch and vLLM ship: nothing is compiled on the user's machine.

One module per scheme: cpu_w3a16, cpu_w4a8, cpu_w8a16 (the vocabulary's tables). What each keeps of
a linear [N, K], and what then runs, stands at its head. Where 128 does not divide K, the weights of
bf16 and fp16 are padded to whole groups with zeros, and so is x in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qig_serve.formats import QuantScheme, unsupported_shape
from qig_serve.kernels import cpu_w3a16, cpu_w4a8, cpu_w8a16
from qig_serve.kernels.library import Prepared
from qig_serve.packing import unpack


def can_implement(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device_capability: tuple[int, int] | None = None,
) -> tuple[bool, str]:
    """Whether a linear [n, k] can run in the scheme with activations of `dtype`, or why not."""
    if scheme.name not in PATHS:
        return False, f"no CPU kernel for scheme {scheme.name}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"activations must be bfloat16, float16 or float32, not {dtype}"
    if reason := unsupported_shape(scheme, n, k):
        return False, reason
    return True, ""


def kernel_name(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype) -> str:
    """What runs a linear [n, k], in words."""
    reference = dtype == torch.float32 and scheme.name != "w8a16"
    return "fp32 reference" if reference else PATHS[scheme.name].describe(n, dtype)


def prepare(scheme: QuantScheme, tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) as the kernels want them.

    dtype: of the activations. What is kept stands at the head of the scheme's module. ValueError
    if no kernel can run it.
    """
    codes = unpack(tensors["weight_packed"], scheme.bits, scheme.symmetric)  # [N, K]
    n, k = codes.shape
    possible, reason = can_implement(scheme, n, k, dtype)
    if not possible:
        raise ValueError(reason)
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    return PATHS[scheme.name].prepare(codes, scale, zero, dtype)


def linear(
    scheme: QuantScheme,
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times the prepared weight [N, K] transposed, plus bias [N]: [..., N]."""
    flat = x.reshape(-1, k)
    p = prepared
    if "rows" in p:
        out = torch.ops.qig.cpu_w8a16(flat, p["rows"], p["power"], p["rest"], bias)
    elif "weight" in p:
        out = F.linear(flat, p["weight"], bias)
    elif "codes" in p:
        out = torch.ops.qig.cpu_w4a8_codes(flat, p["codes"], p["scale"], bias)
    elif "compensation" in p:
        out = torch.ops.qig.cpu_w4a8(
            flat, p["packed"], p["zeros"], p["scales"], p["compensation"], bias
        )
    else:
        out = torch.ops.qig.cpu_w3a16(flat, p["packed"], p["scales"], bias, n)
    return out.reshape(*x.shape[:-1], n)


def embedding(
    scheme: QuantScheme, ids: torch.Tensor, prepared: Prepared, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `ids` [...] of the prepared table [N, K] in `dtype`: [..., K]."""
    return cpu_w8a16.embedding(ids, prepared, dtype)


def compile_ahead(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool = False,
) -> None:
    """Nothing is compiled on a CPU."""


def warm_up(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool = False,
) -> None:
    """Nothing to compile; finds out once what this processor offers."""
    PATHS[scheme.name].look_up()


@dataclass(frozen=True)
class CpuPath:
    """What a scheme needs on a CPU, beside the op of its prepared tensors (`linear`)."""

    describe: Callable[[int, torch.dtype], str]
    """(n, dtype) -> what runs it, in words."""
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], Prepared]
    """(codes [N, K], scale, zero point, dtype) -> the kernels' tensors."""
    look_up: Callable[[], object]
    """Finds out what the processor offers."""


PATHS = {
    "w3a16": CpuPath(cpu_w3a16.describe, cpu_w3a16.keep, cpu_w3a16.int4_block),
    "w4a8": CpuPath(cpu_w4a8.describe, cpu_w4a8.keep, cpu_w4a8.vllm_kernels),
    "w8a16": CpuPath(cpu_w8a16.describe, cpu_w8a16.keep, cpu_w8a16.multiplies_bf16),
}
