"""The torch library `qig`, to which the kernel modules add their ops, and what every op does first.

Each op has a fake implementation, so torch.compile sees through; each depends on shapes alone,
waits for nothing and searches nothing, so CUDA graphs capture it. Without a GPU the ops run under
TRITON_INTERPRET=1, slowly, which is how the tests run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qig_serve.formats import QuantScheme

Prepared = dict[str, torch.Tensor]
"""A linear's tensors in the kernels' layout, by name."""


class LinearJob(NamedTuple):
    """A linear [n, k] whose kernels are to be compiled, for activations of `dtype`."""

    scheme: QuantScheme
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool = False


class ExpertsJob(NamedTuple):
    """The same of a layer of experts: gate_up [2 * inter, k] and down [k, inter] of each."""

    scheme: str
    k: int
    inter: int
    experts: int
    top_k: int
    activation: str
    dtype: torch.dtype
    device: torch.device


_library = torch.library.Library("qig", "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op for CUDA tensors, and for CPU tensors under the interpreter."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"qig::{name}", fake, lib=_library)


def use_ptx(x: torch.Tensor) -> bool:
    """Inline PTX runs on a GPU; the interpreter takes the pure Triton twin."""
    return x.device.type == "cuda"


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned, which the compiled loads count on."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def linear_in_slices(
    x: torch.Tensor, n: int, rows: int, bias: torch.Tensor | None,
    fill: Callable[[int, int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """x [M, K] times a weight [N, K] transposed (+ bias), through cuBLAS, some rows at a time.

    fill(first, last, out) writes those rows of the weight into out [last - first, K], returns it.
    """
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    scratch = torch.empty(min(rows, n), x.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        last = min(n, first + rows)
        weight, part = fill(first, last, scratch[: last - first]), out[:, first:last]
        if bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias[first:last], x, weight.t(), out=part)
    return out
