"""A quantized MLP as vLLM's compiler sees it, before and after fusion.py's pass.

As a script under TRITON_INTERPRET=1: runs the fused graph and, compiled by Inductor, the unfused
modules, and compares what comes out.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
import vllm.ir
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from qig_serve import packing
from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.kernels import ops

TOKENS, HIDDEN, INNER = 5, 256, 384
SIZES = ((HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))  # N, K of o, gate_up, down

Weights = dict[str, torch.Tensor]


def stored(scheme: QuantScheme, dtype: torch.dtype) -> list[Weights]:
    """Three linears as a checkpoint has them."""
    torch.manual_seed(1)
    linears = []
    for n, k in SIZES:
        weight = torch.randn(n, k) * 0.05
        scale, zero = packing.minmax_params(weight, scheme, packing.scale_dtype(scheme, dtype))
        codes = packing.quantize(weight, scale, zero, scheme)
        linears.append(packing.pack_linear(codes, scale, zero, scheme, dtype))
    return linears


def inputs(scheme: QuantScheme, dtype: torch.dtype, tokens: int = TOKENS) -> list[Any]:
    """x, residual, norm weights, and the kernel tensors of three linears."""
    torch.manual_seed(0)
    x, residual = (torch.randn(tokens, HIDDEN).to(dtype) for _ in range(2))
    norms = [(torch.rand(HIDDEN) + 0.5).to(dtype) for _ in range(2)]
    return [x, residual, *norms, *(ops.prepare(scheme, s, dtype) for s in stored(scheme, dtype))]


def mlp(
    scheme: QuantScheme, norms: Any,
    x: torch.Tensor, residual: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    o: Weights, gate_up: Weights, down: Weights,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """norm -> o, add and norm -> gate_up, silu * mul -> down."""
    x = norms.rms_norm(x, first, 1e-6)
    x = ops.linear(scheme, x, o, HIDDEN, HIDDEN)
    x, residual = norms.fused_add_rms_norm(x, residual, second, 1e-5)
    x = ops.linear(scheme, x, gate_up, 2 * INNER, HIDDEN)
    x = F.silu(x[..., :INNER]) * x[..., INNER:]
    return ops.linear(scheme, x, down, HIDDEN, INNER), residual


def traced(dtype: torch.dtype, scheme: QuantScheme = SCHEMES["w4a8"]) -> fx.GraphModule:
    """The MLP as Inductor's passes have it: functional, decomposed, any number of tokens."""
    module = functools.partial(mlp, scheme, vllm.ir.ops)
    given = inputs(scheme, dtype)
    return make_fx(module, select_decomp_table(), tracing_mode="symbolic")(*given)


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def exact(scheme: QuantScheme, dtype: torch.dtype, given: list[Any]) -> torch.Tensor:
    """`mlp` in fp32 with the same weights and without quantizing activations."""
    x, residual, first, second = (tensor.float() for tensor in given[:4])
    o, gate_up, down = (packing.unpack_linear(s, scheme) for s in stored(scheme, dtype))
    h = F.rms_norm(x, (HIDDEN,), first, 1e-6) @ o.t()
    h = F.rms_norm(h + residual, (HIDDEN,), second, 1e-5) @ gate_up.t()
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

    for name, dtype in itertools.product(("w4a8", "w3a16"), (torch.bfloat16, torch.float16)):
        scheme = SCHEMES[name]
        module = traced(dtype, scheme)
        fusion = QuantizationFusion()
        fusion(module.graph)
        assert fusion.fused == 3, module.graph
        module.recompile()
        compiled = torch.compile(functools.partial(mlp, scheme, NativeNorms), dynamic=True)
        for tokens in (1, TOKENS, 17):
            given = inputs(scheme, dtype, tokens)
            (fused, residual), (unfused, same_residual) = module(*given), compiled(*given)
            truth = exact(scheme, dtype, given)
            errors = [float((y.float() - truth).norm() / truth.norm()) for y in (fused, unfused)]
            apart = float((fused != unfused).float().mean())
            print(
                f"{name}, {dtype}, {tokens} tokens: fused and compiled off by {errors[0]:.5f} and "
                f"{errors[1]:.5f}, apart in {apart:.2%}"
            )
            assert torch.equal(residual, same_residual)
            assert apart < 0.02 and errors[0] < 1.01 * errors[1] < 0.1


if __name__ == "__main__":
    compare()
