"""fusion_graphs.py's MLP through vLLM's own compiler, with fusion.py's pass and without.

    TRITON_INTERPRET=1 python fusion_in_vllm.py w4a8 bfloat16

vLLM gives CPUs a plainer way of compiling; this asks for the one that GPUs get: its backend, its
passes around ours, its RMSNorm as IR ops, functionalized and lowered. Prints what was fused.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ |= {
    "VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}  # fmt: skip

import fusion_graphs
import interpreter  # noqa: F401
import torch
import vllm.ir
from torch import fx
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from qig_serve.formats import SCHEMES, QuantScheme
from qig_serve.kernels import ops
from qig_serve.vllm_plugin import fusion
from qig_serve.vllm_plugin.fusion import QuantizationFusion


class Recorded(QuantizationFusion):  # type: ignore[misc, valid-type]
    """The pass, and the graphs it left."""

    left: list[list[str]] = []  # noqa: RUF012

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        self.left.append(fusion_graphs.targets(graph))


fusion.QuantizationFusion = Recorded  # type: ignore[misc]


def gpu_config() -> VllmConfig:
    """What vLLM makes of its defaults on a GPU, as far as the compiler is concerned."""
    mode = CompilationMode.VLLM_COMPILE
    config = VllmConfig(compilation_config=CompilationConfig(mode=mode, backend="inductor"))
    compilation = config.compilation_config
    compilation.mode, compilation.ir_enable_torch_wrap = mode, True
    compilation.compile_sizes = []
    config.kernel_config.ir_op_priority.set_default()
    vllm.ir.set_default_torch_wrap(True)
    return config


def model(config: VllmConfig, scheme: QuantScheme, dtype: torch.dtype) -> torch.nn.Module:
    """fusion_graphs.mlp out of vLLM's layers."""
    hidden, inner = fusion_graphs.HIDDEN, fusion_graphs.INNER

    @support_torch_compile(dynamic_arg_dims={"x": 0, "residual": 0})
    class Mlp(torch.nn.Module):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__()
            _, _, first, second, *linears = fusion_graphs.inputs(scheme, dtype)
            self.first = RMSNorm(hidden, 1e-6, dtype=dtype)
            self.second = RMSNorm(hidden, 1e-5, dtype=dtype)
            self.first.weight.data, self.second.weight.data = first, second
            self.act = SiluAndMul()
            self.names = list(linears[0])
            for i, weights in enumerate(linears):
                for name, tensor in weights.items():
                    self.register_buffer(f"{name}_{i}", tensor)

        def linear(self, x: torch.Tensor, i: int) -> torch.Tensor:
            weights = {name: getattr(self, f"{name}_{i}") for name in self.names}
            return ops.linear(scheme, x, weights, *fusion_graphs.SIZES[i])

        def forward(
            self, x: torch.Tensor, residual: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.linear(self.first(x), 0)
            x, residual = self.second(x, residual)
            return self.linear(self.act(self.linear(x, 1)), 2), residual

    assert fusion_graphs.SIZES[2] == (hidden, inner)
    return Mlp(vllm_config=config)


def run(scheme: QuantScheme, dtype: torch.dtype, fuse: bool) -> list[torch.Tensor]:
    """Outputs and residuals for several numbers of tokens, compiled once."""
    os.environ[fusion.FUSION_VARIABLE] = str(int(fuse))
    config, outputs = gpu_config(), []
    with set_current_vllm_config(config):
        fusion.install(config)
        mlp: Any = model(config, scheme, dtype)
        for tokens in (fusion_graphs.TOKENS, 1, 17):
            x, residual, *_ = fusion_graphs.inputs(scheme, dtype, tokens)
            with set_forward_context(None, config, num_tokens=tokens):
                outputs += mlp(x, residual)
    return [output.clone() for output in outputs]


def main(scheme: str, dtype: str) -> None:
    fused = run(SCHEMES[scheme], getattr(torch, dtype), True)
    (left,) = Recorded.left
    print("left:", *left)
    unfused = run(SCHEMES[scheme], getattr(torch, dtype), False)
    assert len(Recorded.left) == 1, "fused in spite of the switch"
    most = 0.03 if dtype == "float16" else 0.02  # AVX512: 2.2% of fp16
    for one, other in zip(fused, unfused, strict=True):
        assert bool(one.isfinite().all()) and float(one.float().norm()) > 0
        apart = float((one != other).float().mean())
        assert apart < most, f"{apart:.2%} of {list(one.shape)} differ"
        print(f"{list(one.shape)}: {apart:.2%} differ")


if __name__ == "__main__":
    main(*sys.argv[1:])
