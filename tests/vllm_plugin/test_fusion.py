"""fusion.py on graphs: what is found and replaced, what is left alone, and that numbers agree."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import fusion_graphs
import vllm.ir
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.config import CompilationConfig, CompilationMode
from vllm.model_executor.layers.activation import SiluAndMul

from qig_serve.formats import SCHEMES
from qig_serve.kernels import ops, reference
from qig_serve.vllm_plugin import compat
from qig_serve.vllm_plugin import fusion as fusion_module
from qig_serve.vllm_plugin.fusion import QuantizationFusion, install
from qig_serve.vllm_plugin.linear import QigLinearMethod

FOLDER = Path(__file__).parent
NORMS = ("rms_norm", "fused_add_rms_norm")
GETITEM = "<built-in function getitem>"
QUANTIZE = "qig.quantize_activation.default"


@pytest.fixture(autouse=True)
def operators_as_compiled() -> Iterator[None]:
    """vLLM's operators stay whole in a graph, whatever an engine of this process has set."""
    with vllm.ir.enable_torch_wrap(True):
        yield


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_w3a16_linears_take_the_norm_or_silu_before_them(
    fusion: QuantizationFusion, dtype: torch.dtype
) -> None:
    module = fusion_graphs.traced(dtype, SCHEMES["w3a16"])
    before = fusion.fused
    fusion(module.graph)
    module.graph.lint()
    assert fusion.fused == before + 3
    found = fusion_graphs.targets(module.graph)
    assert found == [
        "qig.rms_norm_w3a16_linear.default", GETITEM, "qig.rms_norm_w3a16_linear.default",
        GETITEM, GETITEM, "qig.silu_mul_w3a16_linear.default",
    ]  # fmt: skip
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")


def test_w3a16_linears_that_share_an_input_are_left(fusion: QuantizationFusion) -> None:
    scheme = SCHEMES["w3a16"]
    x, residual, weight, _, prepared, *_ = fusion_graphs.inputs(scheme, torch.bfloat16)
    size = fusion_graphs.HIDDEN

    def twice(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, p: Any) -> Any:
        def linear(x: torch.Tensor) -> torch.Tensor:
            return ops.linear(scheme, x, p, size, size)

        normalized, added = vllm.ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6)
        part = vllm.ir.ops.rms_norm(added, weight, 1e-6, 64)  # the variance of 64 inputs
        gated = SiluAndMul.forward_native(torch.cat([added, residual], 1))
        wide = vllm.ir.ops.rms_norm(added, weight.float(), 1e-6)
        outs = [linear(y) for y in (normalized, normalized, part, gated, wide)]
        return *outs, added, gated

    module = make_fx(twice, select_decomp_table(), tracing_mode="symbolic")(
        x, residual, weight, prepared
    )
    before = fusion.fused
    fusion(module.graph)
    assert fusion.fused == before
    assert fusion_graphs.targets(module.graph).count("qig.w3a16_linear.default") == 5


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


def config(mode: CompilationMode = CompilationMode.VLLM_COMPILE, **passes: object) -> Any:
    compilation = SimpleNamespace(mode=mode, inductor_compile_config=passes)
    return SimpleNamespace(compilation_config=compilation)


def installed(vllm_config: Any) -> list[object]:
    return list(vllm_config.compilation_config.inductor_compile_config.values())


def test_it_takes_its_place_once() -> None:
    free = config()
    install(free)
    (first,) = installed(free)
    assert isinstance(first, QuantizationFusion) and len(first.uuid()) == 64
    install(free)
    assert installed(free) == [first]


class Recorder(compat.inductor_pass()):  # type: ignore[misc]
    """Another pass: keeps how many quantizations it saw; for up to `most` tokens."""

    def __init__(self, most: int) -> None:
        self.most, self.saw = most, []

    def __call__(self, graph: fx.Graph) -> None:
        self.saw.append(fusion_graphs.targets(graph).count(QUANTIZE))

    def is_applicable_for_range(self, compile_range: int) -> bool:
        return compile_range <= self.most

    def uuid(self) -> str:
        return f"recorder {self.most}"


def test_another_pass_in_its_place_runs_first() -> None:
    other = Recorder(16)
    taken = config(post_grad_custom_post_pass=other)
    install(taken)
    install(taken)
    (chain,) = installed(taken)
    assert isinstance(chain, QuantizationFusion) and chain.first is other
    assert (
        len({chain.uuid(), QuantizationFusion().uuid(), QuantizationFusion(Recorder(1)).uuid()})
        == 3
    )
    for tokens, saw in ((8, [3]), (17, [3])):
        module = fusion_graphs.traced(torch.bfloat16)
        assert chain.is_applicable_for_range(tokens)
        chain(module.graph)
        assert QUANTIZE not in fusion_graphs.targets(module.graph)
        assert other.saw == saw


def test_it_steps_back_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """From what is no pass of vLLM's, and from a vLLM without IR ops."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    monkeypatch.setattr(logging.getLogger("vllm.qig_serve.fusion"), "handlers", [handler])
    fusion_module.step_back.cache_clear()
    taken = config(post_grad_custom_post_pass="another")
    for _ in range(3):
        install(taken)
    assert installed(taken) == ["another"]
    (line,) = said
    assert line.getMessage().startswith(
        "Activations are quantized by kernels of their own: Inductor's post_grad"
    )
    monkeypatch.setattr(compat, "has_ir_norms", lambda: False)
    free = config()
    install(free)
    assert installed(free) == [] and "not an IR op" in said[1].getMessage()


def test_vllms_configuration_takes_it() -> None:
    """Its hash keys vLLM's compile caches; it is copied, printed and sent to other processes."""
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    without = compilation.compute_hash()
    install(SimpleNamespace(compilation_config=compilation))
    assert compilation.compute_hash() not in (without, None)
    (key,) = (k for k, v in compilation.inductor_compile_config.items() if "Fusion" in str(v))
    fusion = compilation.inductor_compile_config[key]
    for copied in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert isinstance(copied, QuantizationFusion) and copied.uuid() == fusion.uuid()
        module = fusion_graphs.traced(torch.float16)
        copied(module.graph)
        assert QUANTIZE not in fusion_graphs.targets(module.graph)
    assert "Fusion" not in str(compilation)


@pytest.mark.parametrize(
    ("scheme", "variable", "mode", "cuda", "expected"),
    [
        ("w4a8", None, CompilationMode.VLLM_COMPILE, True, True),
        ("w4a8", "1", CompilationMode.VLLM_COMPILE, True, True),
        ("w4a8", "0", CompilationMode.VLLM_COMPILE, True, False),
        ("w4a8", None, CompilationMode.NONE, True, False),
        ("w4a8", None, CompilationMode.VLLM_COMPILE, False, False),
        ("w3a16", None, CompilationMode.VLLM_COMPILE, True, True),
    ],
)
def test_a_linear_on_a_gpu_installs_it_where_vllm_compiles(
    scheme: str,
    variable: str | None,
    mode: CompilationMode,
    cuda: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_config = config(mode)
    gpu = SimpleNamespace(is_cpu=lambda: not cuda, is_cuda=lambda: cuda)
    monkeypatch.setattr("qig_serve.vllm_plugin.linear.current_platform", gpu)
    monkeypatch.setattr("qig_serve.vllm_plugin.linear.get_current_vllm_config", lambda: vllm_config)
    monkeypatch.delenv("QIG_FUSE_QUANTIZATION", raising=False)
    if variable is not None:
        monkeypatch.setenv("QIG_FUSE_QUANTIZATION", variable)
    QigLinearMethod(SimpleNamespace(scheme=SCHEMES[scheme]), "m.o_proj")
    assert bool(installed(vllm_config)) == expected


@pytest.mark.parametrize(
    ("m", "k", "dtype"),
    [(1, 128, torch.float16), (5, 1152, torch.float16), (33, 300, torch.bfloat16)],
    ids=str,
)
def test_the_oracle_rounds_where_vllm_compiled_rounds(m: int, k: int, dtype: torch.dtype) -> None:
    """Bit for bit; the fused kernels are compared with the oracle in quantizer_checks.py.

    Inductor's C++ here stands for its Triton: both leave out roundings between fused operations.
    Inputs are multiples of 1/8, whose squares add up exactly in any order.
    """
    torch.manual_seed(m)
    x, residual = (torch.randint(-24, 25, (m, k)).div(8).to(dtype) for _ in range(2))
    residual[:, ::12] *= 16  # so that bf16 rounds the sum
    weight = (torch.rand(k) + 0.5).to(dtype)
    native = {name: vllm.ir.ops.__dict__[name].impls["native"].impl_fn for name in NORMS}

    def modules(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        plain = native["rms_norm"](x, weight, 1e-6)
        normalized, added = native["fused_add_rms_norm"](x, residual, weight, 1e-5)
        return plain, normalized, added, SiluAndMul.forward_native(gate_up)

    gate_up = (torch.randn(m, 2 * k) * 3).to(dtype)
    compiled = torch.compile(modules, dynamic=True)(x, residual, weight, gate_up)
    expected = (
        reference.rms_norm(x, weight, 1e-6)[0],
        *reference.rms_norm(x, weight, 1e-5, residual),
        reference.silu_mul(gate_up),
    )
    for got, wanted in zip(compiled, expected, strict=True):
        apart = (got != wanted).float().mean()  # an ulp of exp's
        assert float(apart) <= (1e-3 if wanted is expected[-1] else 0), apart
    eager = modules(x, residual, weight, gate_up)
    assert m == 1 or not torch.equal(eager[1], compiled[1]), "the test shows nothing"


def interpreted(script: str, *arguments: str) -> str:
    """What a script of this folder prints under Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / script), *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent / "kernels")]),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_vllms_compiler_runs_the_pass(scheme: str, dtype: str) -> None:
    """Among its own, on the graphs it makes of its own modules; the numbers stay the same."""
    printed = interpreted("fusion_in_vllm.py", scheme, dtype)
    what = "quantize" if scheme == "w4a8" else "w3a16_linear"
    assert printed.count(f"qig.rms_norm_{what}.default") == 2
    assert printed.count(f"qig.silu_mul_{what}.default") == 1
    assert "vllm_ir" not in printed and QUANTIZE not in printed
    assert printed.count("differ") == 6


@pytest.mark.slow
def test_fused_and_unfused_graphs_agree_under_the_interpreter() -> None:
    assert interpreted("fusion_graphs.py").count("fused and compiled") == 12
