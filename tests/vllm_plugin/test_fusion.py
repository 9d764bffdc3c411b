"""fusion.py on graphs: what is found and replaced, what is left alone, and that numbers agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import fusion_graphs
import vllm.ir
from torch.fx.experimental.proxy_tensor import make_fx

from qig_serve.errors import UserError
from qig_serve.formats import SCHEMES
from qig_serve.vllm_plugin.fusion import QuantizationFusion, install
from qig_serve.vllm_plugin.linear import QigLinearMethod

FOLDER = Path(__file__).parent
QUANTIZE = "qig.quantize_activation.default"


@pytest.fixture(scope="module")
def fusion() -> QuantizationFusion:
    return QuantizationFusion()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_and_silu_take_the_quantization(
    fusion: QuantizationFusion, dtype: torch.dtype
) -> None:
    module = fusion_graphs.traced(dtype)
    assert fusion_graphs.targets(module.graph).count(QUANTIZE) == 3
    before = fusion.fused
    fusion(module.graph)
    module.graph.lint()
    assert fusion.fused == before + 3
    found = fusion_graphs.targets(module.graph)
    assert QUANTIZE not in found
    assert found.count("qig.rms_norm_quantize.default") == 2
    assert found.count("qig.silu_mul_quantize.default") == 1
    assert found.count("qig.w4a8_linear.default") == 3
    assert not any("vllm_ir" in name or "sigmoid" in name or "exp" in name for name in found)
    epsilons = [n.args[2] for n in module.graph.nodes if "rms_norm_quantize" in str(n.target)]
    assert epsilons == [1e-6, 1e-5]


def test_an_activation_that_is_also_read_in_16_bits_is_left(fusion: QuantizationFusion) -> None:
    def shared(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normalized = vllm.ir.ops.rms_norm(x, weight, 1e-6)
        return *torch.ops.qig.quantize_activation(normalized), normalized

    x = torch.randn(3, 128, dtype=torch.bfloat16)
    module = make_fx(shared, tracing_mode="symbolic")(x, x[0].clone())
    before = fusion.fused
    fusion(module.graph)
    assert fusion.fused == before
    assert QUANTIZE in fusion_graphs.targets(module.graph)


def test_a_norm_weight_of_another_dtype_is_left(fusion: QuantizationFusion) -> None:
    def wide(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.qig.quantize_activation(vllm.ir.ops.rms_norm(x, weight, 1e-6))

    x = torch.randn(3, 128, dtype=torch.bfloat16)
    module = make_fx(wide, tracing_mode="symbolic")(x, torch.ones(128))
    before = fusion.fused
    fusion(module.graph)
    assert fusion.fused == before


def test_it_takes_its_place_once_and_nobody_elses() -> None:
    def config(**passes: object) -> SimpleNamespace:
        return SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=passes))

    free = config()
    install(free)
    (first,) = free.compilation_config.inductor_compile_config.values()
    assert isinstance(first, QuantizationFusion) and len(first.uuid()) == 64
    install(free)
    assert list(free.compilation_config.inductor_compile_config.values()) == [first]
    with pytest.raises(UserError, match="QIG_FUSE_QUANTIZATION=1 needs Inductor's post_grad"):
        install(config(post_grad_custom_post_pass="another"))


@pytest.mark.parametrize(
    ("scheme", "asked", "installed"),
    [("w4a8", "1", True), ("w4a8", "0", False), ("w3a16", "1", False)],
)
def test_a_linear_on_a_gpu_installs_it_when_asked(
    scheme: str, asked: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: dict[str, object] = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=passes))
    gpu = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr("qig_serve.vllm_plugin.linear.current_platform", gpu)
    monkeypatch.setattr("qig_serve.vllm_plugin.linear.get_current_vllm_config", lambda: config)
    monkeypatch.setenv("QIG_FUSE_QUANTIZATION", asked)
    QigLinearMethod(SimpleNamespace(scheme=SCHEMES[scheme]), "m.o_proj")
    assert bool(passes) == installed


@pytest.mark.slow
def test_fused_and_unfused_graphs_agree_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "fusion_graphs.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent / "kernels")]),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("unfused") == 2
