"""Kernels by name: the groups of a profile's table, and what an engine's layers say runs them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

DECODER = re.compile(r"(^|\.)layers\.\d+\.")
TOWER = re.compile(r"vision|visual|tower")

GROUPS: tuple[tuple[str, str], ...] = (
    # Inductor's names list what is fused and end with the op that takes it, which is no part of
    # it: `triton_red_fused_fused_add_rms_norm_w3a16_linear_2` is a norm.
    ("norm", r"^triton_.*(norm|rsqrt)"),
    ("rotary", r"^triton_.*(rotary|rope|cat_index_select)"),
    ("SiLU * mul", r"^triton_.*silu"),
    # what quantizes comes first: its name says what is fused with it
    ("activation quantization", r"^(?!triton_).*((?<!de)quantize(_kernel|_chunk|_activation)|"
     r"split_halves|(rms_norm|silu_mul)_(quantize|halves|largest)|scaled_int8_quant|per_token_quant|quant_input)"),
    ("dequantization", r"^(?!triton_).*dequantize"),
    ("quantized GEMM", r"^halves_kernel|^(?!triton_).*(w3a16_|w4a8_|marlin|machete|"
     r"humming|_int_mm|qig::|int4|onednn_scaled)"),
    ("attention", r"flash|attention|attn|fmha|reshape_and_cache|concat_and_cache|paged"),
    ("rotary", r"rotary|rope"),
    ("norm", r"norm|rsqrt"),
    ("SiLU * mul", r"silu|act_and_mul|gelu"),
    ("16-bit GEMM", r"gemm|nvjet|cutlass|xmma|gemv|splitk|cublas|onednn_mm|aten::(add|b)?mm"),
    ("copies", r"memcpy|memset|copy|aten::(cat|fill_|zero_)"),
    ("sampling", r"argmax|softmax|topk|sample|sort"),
)  # fmt: skip
OTHER = "other"


def group_of(kernel: str) -> str:
    """The row of the profile's table that a kernel's time is counted in."""
    for group, pattern in GROUPS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return group
    return OTHER


def grouped(times: dict[str, float]) -> dict[str, float]:
    """Kernel -> microseconds becomes group -> microseconds; every group is there, in order."""
    table = dict.fromkeys([*(group for group, _ in GROUPS), OTHER], 0.0)
    for kernel, microseconds in times.items():
        table[group_of(kernel)] += microseconds
    return table


def layer_kernels(named_modules: Iterable[tuple[str, torch.nn.Module]]) -> dict[str, Any]:
    """{"decoder" or "elsewhere": {what runs a linear, in words: how many}}, from the modules."""
    found: dict[str, Counter[str]] = {"decoder": Counter(), "elsewhere": Counter()}
    for name, module in named_modules:
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        inside = DECODER.search(name) and not TOWER.search(name) and name.endswith("_proj")
        where = "decoder" if inside else "elsewhere"
        found[where][_kernel(module, method)] += 1
    return {where: dict(counts) for where, counts in found.items()}


def _kernel(module: torch.nn.Module, method: Any) -> str:
    kind = type(method).__name__
    if hasattr(module, "qig_n"):
        from qig_serve.vllm_plugin.linear import kernel_name

        name = kernel_name(method.scheme, module.qig_n, module.qig_dtype)
        return f"{kind}: {name}"
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        return kind
    kernel = getattr(scheme, "kernel", None)
    return f"{type(scheme).__name__}: {type(kernel).__name__ if kernel else 'its own'}"


def longest(times: dict[str, float], most: int = 12) -> list[list[Any]]:
    """[kernel, microseconds] of those that take longest."""
    return [[k, t] for k, t in sorted(times.items(), key=lambda item: -item[1])[:most] if t > 0]
