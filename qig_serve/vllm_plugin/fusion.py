"""An Inductor pass that puts w4a8's activation quantization into what comes before it.

    RMSNorm (+ residual) -> quantize -> w4a8     becomes  rms_norm_quantize  -> w4a8
    SiLU * mul           -> quantize -> w4a8     becomes  silu_mul_quantize  -> w4a8

One kernel instead of two or three, and the 16-bit activation between them is never written: 112
fewer launches per step on 28 layers. vLLM runs the pass after its own, on the graph that Inductor
has decomposed and before vLLM lowers its RMSNorm (`vllm_ir`), so each pattern is written as the
ops appear there; a graph without them is left as it is.

Off unless QIG_FUSE_QUANTIZATION=1: it has been tested on graphs, not timed on a GPU, and it is not
exact against vLLM's own RMSNorm, which normalizes x + residual before rounding it to 16 bits where
rms_norm_quantize, as the model's own code, normalizes the rounded sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor import pattern_matcher
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from qig_serve.errors import UserError
from qig_serve.kernels import ops  # noqa: F401  (registers the ops that the patterns name)
from qig_serve.vllm_plugin import compat
from qig_serve.vllm_plugin.linear import FUSION_VARIABLE

_EPSILON = 1.25e-6  # stands for whatever epsilon a model has


def install(vllm_config: Any) -> None:
    """Have vLLM run the pass when it compiles; may be called for every layer.

    UserError if the place is taken by another pass.
    """
    from vllm.platforms import current_platform

    passes = vllm_config.compilation_config.inductor_compile_config
    key = current_platform.pass_key
    if isinstance(passes.get(key), QuantizationFusion):
        return
    if key in passes:
        raise UserError(
            f"{FUSION_VARIABLE}=1 needs Inductor's {key}, which the compilation config gives to "
            f"{passes[key]!r}: unset one of them"
        )
    passes[key] = QuantizationFusion()


class QuantizationFusion(compat.inductor_pass()):  # type: ignore[misc]
    """Called by vLLM with a graph, which is changed in place."""

    def __init__(self) -> None:
        if not hasattr(torch.ops.vllm_ir, "rms_norm"):
            raise UserError(f"{FUSION_VARIABLE}=1 needs a vLLM whose RMSNorm is an IR op: unset it")
        self.fused = 0
        self.patterns = pattern_matcher.PatternMatcherPass(pass_name="qig_quantization_fusion")
        with torch._guards.tracing(None), unset_fake_temporarily(), FakeTensorMode():
            x = torch.empty(5, 16, dtype=torch.bfloat16)
            weight = torch.empty(16, dtype=torch.bfloat16)
            self._register(norm, fused_norm, [x, weight], {"epsilon": _EPSILON})
            self._register(add_norm, fused_add_norm, [x, x.clone(), weight], {"epsilon": _EPSILON})
            self._register(silu_mul, fused_silu_mul, [x], {})

    def _register(
        self,
        pattern: Any,
        replacement: Any,
        inputs: list[torch.Tensor],
        scalars: dict[str, float],
    ) -> None:
        pattern_matcher.register_replacement(
            pattern,
            replacement,
            inputs,
            pattern_matcher.fwd_only,
            self.patterns,
            extra_check=has_one_dtype,
            scalar_workaround=scalars,
        )

    def __call__(self, graph: fx.Graph) -> None:
        self.fused += self.patterns.apply(graph)


def norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [M, K], quantized: codes int8 [M, K], scale fp32 [M]."""
    codes, scale = torch.ops.qig.quantize_activation(
        torch.ops.vllm_ir.rms_norm.default(x, weight, epsilon)
    )
    return codes, scale


def fused_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of `norm`."""
    codes, scale, _ = torch.ops.qig.rms_norm_quantize(x, weight, epsilon, None)
    return codes, scale


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, quantized, and the sum [M, K]."""
    normalized, added = torch.ops.vllm_ir.fused_add_rms_norm.default(x, residual, weight, epsilon)
    codes, scale = torch.ops.qig.quantize_activation(normalized)
    return codes, scale, added


def fused_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What takes the place of `add_norm`."""
    codes, scale, added = torch.ops.qig.rms_norm_quantize(x, weight, epsilon, residual)
    return codes, scale, added


def silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of [M, 2 K], as vLLM's SiluAndMul has it, quantized."""
    k = gate_up.shape[-1] // 2
    codes, scale = torch.ops.qig.quantize_activation(F.silu(gate_up[..., :k]) * gate_up[..., k:])
    return codes, scale


def fused_silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of `silu_mul`."""
    codes, scale = torch.ops.qig.silu_mul_quantize(gate_up)
    return codes, scale


def has_one_dtype(match: pattern_matcher.Match) -> bool:
    """Whether a match's tensors are of one 16-bit dtype, as the fused kernels take them."""
    dtypes = set()
    for name in ("x", "residual", "weight", "gate_up"):
        if name in match.kwargs:
            node = match.kwargs[name]
            value = node.meta.get("val") if isinstance(node, fx.Node) else None
            if value is None or value.dim() != (1 if name == "weight" else 2):
                return False
            dtypes.add(value.dtype)
    return len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}
