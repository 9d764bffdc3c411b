"""The CPU path, on kernels that torch and vLLM ship: nothing is compiled on the user's machine.

A scheme is one row of formats.SCHEMES and one module here of the same name with cpu_ before it.
What it keeps of a linear [N, K], and what then runs, stands at its head. It exports

    prepare    (codes [N, K], scale, zero point or None, dtype) -> the kernels' tensors
    linear     (x [M, K], those, n, bias or None) -> [M, N]
    describe   (n, dtype) -> what runs it, in words
    look_up    () finds out what the processor offers
    MANY_ROWS  from which on rows of x are multiplied otherwise

Where 128 does not divide K, the weights of bf16 and fp16 are padded to whole groups with zeros, and
so is x in each call.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from qig_serve.formats import SCHEMES, QuantScheme, unsupported_shape
from qig_serve.kernels.library import LinearJob, Prepared
from qig_serve.packing import unpack

KERNELS: dict[str, ModuleType] = {
    name: import_module(module)
    for name in SCHEMES
    if find_spec(module := f"{__package__}.cpu_{name}")
}


def can_implement(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device_capability: tuple[int, int] | None = None,
) -> tuple[bool, str]:
    """Whether a linear [n, k] can run in the scheme with activations of `dtype`, or why not."""
    if scheme.name not in KERNELS:
        return False, f"no CPU kernel for scheme {scheme.name}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"activations must be bfloat16, float16 or float32, not {dtype}"
    if reason := unsupported_shape(scheme, n, k):
        return False, reason
    return True, ""


def kernel_name(scheme: QuantScheme, n: int, dtype: torch.dtype) -> str:
    """What runs a linear of n rows, in words."""
    return KERNELS[scheme.name].describe(n, dtype)


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
    return KERNELS[scheme.name].prepare(codes, scale, zero, dtype)


def linear(
    scheme: QuantScheme, x: torch.Tensor, prepared: Prepared, n: int, k: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [..., K] times the prepared weight [N, K] transposed, plus bias [N]: [..., N]."""
    out = KERNELS[scheme.name].linear(x.reshape(-1, k), prepared, n, bias)
    return out.reshape(*x.shape[:-1], n)


def embedding(
    scheme: QuantScheme, ids: torch.Tensor, prepared: Prepared, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `ids` [...] of the prepared table [N, K] in `dtype`: [..., K]."""
    return KERNELS[scheme.name].embedding(ids, prepared, dtype)


def token_counts(job: LinearJob) -> list[int]:
    """A number of tokens for each way in which a linear may be run: few rows, and many."""
    return [1, KERNELS[job.scheme.name].MANY_ROWS]


def compile_ahead(job: LinearJob) -> None:
    """Nothing is compiled on a CPU."""


def warm_up(job: LinearJob) -> None:
    """Nothing to compile; finds out once what this processor offers."""
    KERNELS[job.scheme.name].look_up()
