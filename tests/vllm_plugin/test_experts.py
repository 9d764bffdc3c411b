"""The method of experts in vLLM's own layer, loaded by name, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from qig_serve import packing
from qig_serve.formats import SCHEMES
from qig_serve.kernels import reference
from qig_serve.vllm_plugin.config import QigConfig

pytestmark = pytest.mark.usefixtures("options", "no_stance")

EXPERTS, TOP_K, HIDDEN, INTER = 5, 2, 160, 256
PREFIX = "language_model.model.layers.0.mlp.experts"
Stored = list[dict[str, dict[str, torch.Tensor]]]
"""Expert -> projection -> suffix -> tensor."""


def make_layer(
    scheme: str, tp: tuple[int, int] = (1, 0), ep: tuple[int, int] = (1, 0),
    dtype: torch.dtype = torch.float32, inter: int = INTER, **changes: Any,
) -> Any:  # fmt: skip
    """vLLM's layer of one rank (size, rank), with our method."""
    parallel = FusedMoEParallelConfig(
        tp_size=tp[0], tp_rank=tp[1], pcp_size=1, pcp_rank=0, dp_size=1, dp_rank=0,
        ep_size=ep[0], ep_rank=ep[1], sp_size=1, use_ep=ep[0] > 1, all2all_backend="naive",
        enable_eplb=changes.pop("enable_eplb", False),
    )  # fmt: skip
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=TOP_K, global_num_experts=EXPERTS,
        num_redundant_experts=0, num_expert_group=None, moe_parallel_config=parallel,
        placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    activation = changes.pop("activation", MoEActivation.SILU)
    moe = FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=inter,
        num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS,
        activation=activation, device="cpu", routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel, in_dtype=dtype, **changes,
    )  # fmt: skip
    bits, group = {"w3a16": (3, 128), "w4a8": (4, None)}[scheme]
    config = QigConfig.from_config(
        {"quant_method": "qig", "format_version": 1, "scheme": scheme, "bits": bits,
         "group_size": group, "ignore": ["model.visual"]}
    )  # fmt: skip
    return RoutedExperts(PREFIX, dtype, moe, config, expert_map_manager=manager)


def stored_experts(scheme: str, inter: int = INTER) -> Stored:
    generator = torch.Generator().manual_seed(2)

    def linear(n: int, k: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(n, k, generator=generator) * 0.1
        scale, zero = packing.minmax_params(weight, SCHEMES[scheme])
        codes = packing.quantize(weight, scale, zero, SCHEMES[scheme])
        return packing.pack_linear(codes, scale, zero, SCHEMES[scheme], torch.float32)

    shapes = {
        "gate_proj": (inter, HIDDEN),
        "up_proj": (inter, HIDDEN),
        "down_proj": (HIDDEN, inter),
    }
    return [{name: linear(*shape) for name, shape in shapes.items()} for _ in range(EXPERTS)]


def named(stored: Stored) -> dict[str, torch.Tensor]:
    return {
        f"{e}.{projection}.{suffix}": tensor
        for e, expert in enumerate(stored)
        for projection, tensors in expert.items()
        for suffix, tensor in tensors.items()
    }


def load(layer: Any, tensors: dict[str, torch.Tensor]) -> Any:
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(m: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m)
    ids = torch.rand(m, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
    routing = torch.rand(m, TOP_K, generator=generator)
    return torch.randn(m, HIDDEN, generator=generator), routing, ids


def expected(scheme: str, stored: Stored, activation: str = "silu") -> torch.Tensor:
    gate_up = [
        {s: torch.cat([e["gate_proj"][s], e["up_proj"][s]]) for s in e["gate_proj"]} for e in stored
    ]
    down = [e["down_proj"] for e in stored]
    return reference.experts(*inputs(), gate_up, down, scheme, activation)


def output(layer: Any) -> torch.Tensor:
    x, routing, ids = inputs()
    return layer.quant_method.apply(layer, x.to(layer.qig_dtype), routing, ids, None, None)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_loaded_by_name_it_computes_what_the_oracle_does(scheme: str) -> None:
    stored = stored_experts(scheme)
    layer = load(make_layer(scheme), named(stored))
    torch.testing.assert_close(output(layer), expected(scheme, stored), rtol=1e-4, atol=1e-5)
    names = [name for name, _ in layer.named_parameters()]
    assert names and all(name.startswith(("qig_w13_", "qig_w2_")) for name in names)
    nothing = layer.quant_method.apply(layer, *(t[:0] for t in inputs()), None, None)
    assert nothing.shape == (0, HIDDEN)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_the_activation_is_the_layers(scheme: str) -> None:
    """Gemma 4's experts have another, and so has what they answer."""
    stored = stored_experts(scheme)
    layer = load(make_layer(scheme, activation=MoEActivation.GELU_TANH), named(stored))
    wanted = expected(scheme, stored, "gelu_tanh")
    torch.testing.assert_close(output(layer), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, expected(scheme, stored), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_an_activation_that_no_kernel_has(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's names: GELU by the error function, which the tanh is near, too."""
    from qig_serve.kernels import cpu_experts
    from qig_serve.kernels import experts as gpu_experts
    from qig_serve.vllm_plugin import experts

    backend = {"cpu": cpu_experts, "cuda": gpu_experts}[platform]
    monkeypatch.setattr(experts, "experts_backend", lambda: backend)
    said = rf"^{PREFIX}: .*silu or gelu_tanh, and these have gelu: leave them in 16 bits$"
    with pytest.raises(ValueError, match=said):
        make_layer("w3a16", activation=MoEActivation.GELU)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_in_bfloat16(scheme: str) -> None:
    stored = stored_experts(scheme)
    got = output(load(make_layer(scheme, dtype=torch.bfloat16), named(stored)))
    wanted = expected(scheme, stored)
    assert float((got.float() - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize("parallel", ["tp", "ep"])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_two_ranks_add_up(scheme: str, parallel: str) -> None:
    """Five experts on two ranks are three and two; w4a8's codes of half a row have other scales."""
    stored = stored_experts(scheme)
    parts = [
        output(load(make_layer(scheme, **{parallel: (2, rank)}), named(stored)))
        for rank in range(2)
    ]
    near = 2e-2 if (scheme, parallel) == ("w4a8", "tp") else 1e-4
    wanted = expected(scheme, stored)
    assert float((sum(parts) - wanted).norm() / wanted.norm()) < near
    assert all(part.abs().sum() > 0 for part in parts)


def test_what_cannot_be_cut_names_sizes_that_work() -> None:
    with pytest.raises(
        ValueError, match=r"experts\.down_proj: 384 inputs split 2 ways.*of 1, or --enable-expert"
    ):
        make_layer("w3a16", tp=(2, 0), inter=384)
    make_layer("w4a8", tp=(2, 0), inter=384)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("3.up_proj.weight_packed", lambda t: t.long(), "has torch.int64"),
        ("1.down_proj.weight_packed", lambda t: t[:, :12], "expected int32 with 24 columns"),
        ("4.gate_proj.weight_scale", lambda t: t[:7], "has 7 rows, expected 256"),
        ("0.down_proj.weight_zero_point", lambda t: t.float(), "expected uint8"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, change: Any, message: str) -> None:
    tensors = named(stored_experts("w3a16"))
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=rf"^{PREFIX}\.{name}: the checkpoint .*{message}"):
        load(make_layer("w3a16"), tensors)


@pytest.mark.parametrize("ep", [(1, 0), (2, 1)])
def test_a_missing_tensor_is_named(ep: tuple[int, int]) -> None:
    tensors = named(stored_experts("w4a8"))
    del tensors["3.up_proj.weight_scale"]
    with pytest.raises(ValueError, match=rf"^{PREFIX}\.3\.up_proj\.weight_scale: .* no scales"):
        load(make_layer("w4a8", ep=ep), tensors)


def test_dummy_weights(options: SimpleNamespace) -> None:
    options.load_config.load_format = "dummy"
    layer = make_layer("w3a16")
    for name, parameter in layer.named_parameters():
        if name.endswith("scale"):
            parameter.data.uniform_(-1e-3, 1e-3)
    layer.quant_method.process_weights_after_loading(layer)
    assert output(layer).isfinite().all()


def test_what_is_not_served_is_refused_in_a_sentence(options: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"experts: .*leave --enable-eplb out$"):
        make_layer("w4a8", enable_eplb=True)
    options.lora_config = SimpleNamespace(target_modules=None)
    with pytest.raises(ValueError, match=r"--lora-target-modules q_proj k_proj v_proj o_proj$"):
        make_layer("w4a8")
    options.lora_config.target_modules = ["q_proj", "v_proj"]
    make_layer("w4a8")
    with pytest.raises(ValueError, match="without biases"):
        make_layer("w4a8", has_bias=True)


def test_experts_left_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("w4a8")
    config = layer.quant_config
    config.ignored = {PREFIX}
    assert config.get_quant_method(layer, PREFIX) is None
    config.ignored = {f"{PREFIX}.3.down_proj"}
    with pytest.raises(ValueError, match=r"3\.down_proj is left in 16 bits.*all or none"):
        config.get_quant_method(layer, PREFIX)
