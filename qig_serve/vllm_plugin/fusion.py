"""An Inductor pass that puts the quantization of activations into what comes before it.

    RMSNorm (+ residual) -> quantize -> w4a8     becomes  rms_norm_quantize  -> w4a8
    SiLU * mul           -> quantize -> w4a8     becomes  silu_mul_quantize  -> w4a8
    RMSNorm (+ residual) -> w3a16                becomes  rms_norm_w3a16
    SiLU * mul           -> w3a16                becomes  silu_mul_w3a16

One kernel instead of two or three, and the 16-bit activation between them is never written: 112
fewer launches per step on 28 layers. w3a16 quantizes inside its op, for few tokens alone, so there
it is the whole linear that takes what comes before (kernels/fused_linear.py).

vLLM runs the pass after its own, on the graph that Inductor has decomposed and before vLLM lowers
its RMSNorm (`vllm_ir`), so each pattern is written as the ops appear there; a graph without them is
left as it is.

The fused kernels round where the graph would, compiled: everything in fp32, one rounding at the end
(the header of kernels/quantize_activation.py says where that is read). Where vLLM does not compile,
the linears quantize in a kernel of their own. QIG_FUSE_QUANTIZATION=0 has them do so anyway.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor import pattern_matcher
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from qig_serve.kernels import ops  # noqa: F401  (registers the ops that the patterns name)
from qig_serve.vllm_plugin import compat

FUSION_VARIABLE = "QIG_FUSE_QUANTIZATION"
"""0: linears quantize their activations in a kernel of their own."""

_EPSILON = 1.25e-6  # stands for whatever epsilon a model has
_logger = logging.getLogger("vllm.qig_serve.fusion")  # under vLLM's, whose handlers it has


def install(vllm_config: Any) -> None:
    """Have vLLM run the pass when it compiles; may be called for every layer.

    Another pass in the same place runs first. If that, or this vLLM, does not allow for ours, one
    line in the log says so, and activations are quantized by kernels of their own.
    """
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    if os.environ.get(FUSION_VARIABLE) == "0" or not compilation.mode:
        return
    passes, key = compilation.inductor_compile_config, current_platform.pass_key
    other = passes.get(key)
    if isinstance(other, QuantizationFusion):
        return
    if not compat.has_ir_norms():
        step_back("this vLLM's RMSNorm is not an IR op")
    elif other is not None and not isinstance(other, compat.inductor_pass()):
        step_back(f"Inductor's {key} is {other!r}, which is not a pass of vLLM's")
    else:
        passes[key] = QuantizationFusion(other)


@functools.cache  # a line once
def step_back(reason: str) -> None:
    """Says in the log why nothing is fused."""
    _logger.warning("Activations are quantized by kernels of their own: %s.", reason)


class QuantizationFusion(compat.inductor_pass()):  # type: ignore[misc]
    """Called by vLLM with a graph, which is changed in place, after `first` has changed it."""

    def __init__(self, first: Any = None) -> None:
        compat.has_ir_norms()
        self.first, self.first_applies = first, True
        self.fused = 0
        self.gates = pattern_matcher.PatternMatcherPass(pass_name="qig_gates")
        self.patterns = pattern_matcher.PatternMatcherPass(pass_name="qig_quantization_fusion")
        with torch._guards.tracing(None), unset_fake_temporarily(), FakeTensorMode():
            x = torch.empty(5, 16, dtype=torch.bfloat16)
            weight = torch.empty(16, dtype=torch.bfloat16)
            epsilon = {"epsilon": _EPSILON}
            _register(self.gates, gated, gated_at_once, [x])
            _register(self.patterns, norm, fused_norm, [x, weight], epsilon)
            _register(self.patterns, add_norm, fused_add_norm, [x, x.clone(), weight], epsilon)
            _register(self.patterns, silu_mul, fused_silu_mul, [x])

    def __call__(self, graph: fx.Graph) -> None:
        if self.first is not None and self.first_applies:
            self.first(graph)
        self.gates.apply(graph)
        self.fused += self.patterns.apply(graph) + fuse_linears(graph)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """vLLM asks before it calls: ours is for any number of tokens, the first may not be."""
        self.first_applies = self.first is None or self.first.is_applicable_for_range(compile_range)
        return True

    def __reduce__(self) -> Any:
        """Compiled patterns are not pickled: vLLM copies its configuration."""
        return type(self), (self.first,)

    def uuid(self) -> str:
        """Key of vLLM's and Inductor's caches: this file, and the pass before."""
        source = hashlib.sha256(Path(__file__).read_bytes())
        if self.first is not None:
            source.update(repr(self.first.uuid()).encode())
        return source.hexdigest()


def _register(
    patterns: pattern_matcher.PatternMatcherPass,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    inputs: list[torch.Tensor],
    scalars: dict[str, float] | None = None,
) -> None:
    def allowed(match: pattern_matcher.Match) -> bool:
        return has_one_dtype(match) and (pattern is not gated or only_a_linear_reads(match))

    pattern_matcher.register_replacement(
        pattern,
        replacement,
        inputs,
        pattern_matcher.fwd_only,
        patterns,
        extra_check=allowed,
        scalar_workaround=scalars or {},
    )


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


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [M, 2 K], as vLLM's SiluAndMul has it."""
    k = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :k]) * gate_up[..., k:]


def gated_at_once(gate_up: torch.Tensor) -> torch.Tensor:
    """What takes the place of `gated` before a w3a16 linear, until `fuse_linears`."""
    return torch.ops.qig.silu_mul(gate_up)


def silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated`, quantized."""
    codes, scale = torch.ops.qig.quantize_activation(gated(gate_up))
    return codes, scale


def fused_silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of `silu_mul`."""
    codes, scale = torch.ops.qig.silu_mul_quantize(gate_up)
    return codes, scale


def has_one_dtype(match: pattern_matcher.Match) -> bool:
    """Whether a match's tensors are of one 16-bit dtype, as the fused kernels take them."""
    given = match.kwargs
    weights = [given["weight"]] if "weight" in given else []
    activations = [given[name] for name in ("x", "residual", "gate_up") if name in given]
    return of_one_dtype(activations, weights)


def of_one_dtype(activations: Sequence[Any], weights: Sequence[Any]) -> bool:
    """Whether nodes are [M, K] and [K] of one 16-bit dtype."""
    dtypes = set()
    for node in (*activations, *weights):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if value is None or value.dim() != (1 if node in weights else 2):
            return False
        dtypes.add(value.dtype)
    return len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}


def only_a_linear_reads(match: pattern_matcher.Match) -> bool:
    """Whether the value matched goes to one w3a16 linear and nowhere else."""
    (user, *others) = match.output_node().users
    return not others and user.target is torch.ops.qig.w3a16_linear.default


def fuse_linears(graph: fx.Graph) -> int:
    """w3a16 linears whose input is a norm's, or qig::silu_mul's, and nobody else's: how many."""
    found = 0
    target = torch.ops.qig.w3a16_linear.default
    for linear in graph.find_nodes(op="call_function", target=target):
        x = linear.args[0]
        if linear.kwargs or not isinstance(x, fx.Node) or len(x.users) != 1:
            continue
        with graph.inserting_before(linear):
            if x.target is torch.ops.qig.silu_mul.default:
                fused = torch.ops.qig.silu_mul_w3a16_linear.default
                out = graph.call_function(fused, (x.args[0], *linear.args[1:]))
            elif norm := Norm.whose_output_is(x):
                out = norm.fused_with(linear)
            else:
                continue
        out.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(out)
        graph.erase_node(linear)
        found += 1
    if found:
        graph.eliminate_dead_code()
        pattern_matcher.stable_topological_sort(graph)
    return found


@dataclass(frozen=True)
class Norm:
    """A node of vLLM's RMSNorm and what it is given."""

    node: fx.Node
    x: fx.Node
    residual: fx.Node | None
    weight: fx.Node
    epsilon: float

    @classmethod
    def whose_output_is(cls, x: fx.Node) -> Norm | None:
        """The norm that x is the normalized output of, if the fused kernels take it."""
        adds = x.target is operator.getitem and x.args[1] == 0
        node: Any = x.args[0] if adds else x
        ir = torch.ops.vllm_ir
        op = ir.fused_add_rms_norm.default if adds else ir.rms_norm.default
        if node.target is not op or node.kwargs:
            return None
        h, *residual, weight, epsilon = node.args[: 4 if adds else 3]
        partly = any(argument is not None for argument in node.args[4 if adds else 3 :])
        if partly or not of_one_dtype([h, *residual], [weight]):  # variance of a part of the row
            return None
        return cls(node, h, residual[0] if adds else None, weight, epsilon)

    def fused_with(self, linear: fx.Node) -> fx.Node:
        """The linear's output by the fused op, which x + residual comes from, too."""
        graph = linear.graph
        both = graph.call_function(
            torch.ops.qig.rms_norm_w3a16_linear.default,
            (self.x, self.weight, self.epsilon, self.residual, *linear.args[1:]),
        )
        out, added = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        added.meta["val"] = self.x.meta["val"]
        both.meta["val"] = (linear.meta["val"], added.meta["val"])
        for user in self.node.users if self.residual else ():
            if user.args[1] == 1:
                user.replace_all_uses_with(added)
        return out
