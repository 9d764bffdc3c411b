"""A w4a8 MLP as vLLM's compiler sees it, before and after fusion.py's pass.

As a script under TRITON_INTERPRET=1: runs the fused graph and, compiled by Inductor, the unfused
modules, and compares what comes out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import vllm.ir
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import layout, ops

TOKENS, HIDDEN, INNER = 5, 256, 384
W4A8 = SCHEMES["w4a8"]

Weights = dict[str, torch.Tensor]


def linear_weights(n: int, k: int, dtype: torch.dtype) -> Weights:
    scale, _ = packing.minmax_params(weight := torch.randn(n, k) * 0.05, W4A8)
    codes = packing.quantize(weight, scale, None, W4A8)
    return ops.prepare(W4A8, packing.pack_linear(codes, scale, None, W4A8, dtype), dtype)


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> list[Any]:
    """x, residual, norm weights, and the kernel tensors of three linears."""
    torch.manual_seed(0)
    x, residual = (torch.randn(tokens, HIDDEN).to(dtype) for _ in range(2))
    norms = [(torch.rand(HIDDEN) + 0.5).to(dtype) for _ in range(2)]
    sizes = [(HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    return [x, residual, *norms, *(linear_weights(n, k, dtype) for n, k in sizes)]


def mlp(
    norms: Any, x: torch.Tensor, residual: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    o: Weights, gate_up: Weights, down: Weights,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """norm -> o, add and norm -> gate_up, silu * mul -> down."""
    x = norms.rms_norm(x, first, 1e-6)
    x = ops.linear(W4A8, x, o, HIDDEN, HIDDEN)
    x, residual = norms.fused_add_rms_norm(x, residual, second, 1e-5)
    x = ops.linear(W4A8, x, gate_up, 2 * INNER, HIDDEN)
    x = F.silu(x[..., :INNER]) * x[..., INNER:]
    return ops.linear(W4A8, x, down, HIDDEN, INNER), residual


def traced(dtype: torch.dtype) -> fx.GraphModule:
    """The MLP as Inductor's passes have it: functional, decomposed, any number of tokens."""
    module = functools.partial(mlp, vllm.ir.ops)
    return make_fx(module, select_decomp_table(), tracing_mode="symbolic")(*inputs(dtype))


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def exact(
    x: torch.Tensor, residual: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    *linears: Weights,
) -> torch.Tensor:  # fmt: skip
    """`mlp` in fp32 with the same weights and without quantizing activations."""
    sizes = (HIDDEN, 2 * INNER, HIDDEN)
    o, gate_up, down = (
        codes.float() * scale
        for codes, scale in (
            layout.unpack_w4a8(weights["weight_nibbles"], weights["channel_scale"], n)
            for weights, n in zip(linears, sizes, strict=True)
        )
    )
    h = F.rms_norm(x.float(), (HIDDEN,), first.float(), 1e-6) @ o.t()
    h = F.rms_norm(h + residual.float(), (HIDDEN,), second.float(), 1e-5) @ gate_up.t()
    return (F.silu(h[:, :INNER]) * h[:, INNER:]) @ down.t()


class NativeNorms:
    """What vLLM lowers its IR ops to where Inductor compiles."""

    rms_norm = vllm.ir.ops.rms_norm.impls["native"].impl_fn
    fused_add_rms_norm = vllm.ir.ops.fused_add_rms_norm.impls["native"].impl_fn


def compare() -> None:
    """AssertionError unless the fused graph gives what the compiled modules give.

    But for an ulp of a sum or of exp, that is bit for bit; and as near to fp32.
    """
    import interpreter  # noqa: F401

    from qig_serve.vllm_plugin.fusion import QuantizationFusion

    for dtype in (torch.bfloat16, torch.float16):
        module = traced(dtype)
        fusion = QuantizationFusion()
        fusion(module.graph)
        assert fusion.fused == 3, module.graph
        module.recompile()
        compiled = torch.compile(functools.partial(mlp, NativeNorms), dynamic=True)
        for tokens in (TOKENS, 17):
            given = inputs(dtype, tokens)
            (fused, residual), (unfused, same_residual) = module(*given), compiled(*given)
            truth = exact(*given)
            errors = [float((y.float() - truth).norm() / truth.norm()) for y in (fused, unfused)]
            apart = float((fused != unfused).float().mean())
            print(
                f"{dtype}, {tokens} tokens: fused and compiled off by {errors[0]:.5f} and "
                f"{errors[1]:.5f}, apart in {apart:.2%}, residual "
                f"{float((residual != same_residual).float().mean()):.2%}"
            )
            assert torch.equal(residual, same_residual)
            assert apart < 0.02 and errors[0] < 1.01 * errors[1] < 0.1


if __name__ == "__main__":
    compare()
