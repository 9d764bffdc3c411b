"""Registration, names and refusals of the plugin, without loading a model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.models.utils import WeightsMapper

from qig_serve.errors import UserError
from qig_serve.formats import tensor_specs
from qig_serve.kernels.library import LinearJob
from qig_serve.vllm_plugin import check_vllm_version, register
from qig_serve.vllm_plugin.config import QigConfig
from qig_serve.vllm_plugin.linear import QigLinearMethod, check_shape, checked


def quantization_config(scheme: str = "w3a16", **changes: Any) -> dict[str, Any]:
    bits, group = {"w3a16": (3, 128), "w4a8": (4, None)}[scheme]
    config = {
        "quant_method": "qig",
        "format_version": 1,
        "scheme": scheme,
        "bits": bits,
        "group_size": group,
        "ignore": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    return config | changes


@pytest.mark.parametrize("version", ["0.26.0", "0.26.0rc1", "0.32.0+cpu", "0.33.7.post1", "dev"])
def test_supported_versions(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"supports vllm>=0\.26,<0\.34, but vLLM " + version):
        check_vllm_version(version)


def test_registering_twice() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("qig") is QigConfig


def test_bad_config_is_one_sentence() -> None:
    with pytest.raises(UserError, match="quantization_config: unknown scheme 'w5'"):
        QigConfig.from_config(quantization_config() | {"scheme": "w5"})


def test_ignored_names_follow_the_model() -> None:
    """Checkpoint names become vLLM's, twice mapped or not, and match whole dotted parts."""
    config = QigConfig.from_config(quantization_config())
    mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.merger.": "merger.",
            "model.vision_tower.": "vision_tower.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    config.apply_vllm_mapper(mapper)
    config.apply_vllm_mapper(mapper)
    assert config.is_ignored("vision_tower.encoder.layers.0.mlp.fc1")
    assert config.is_ignored("language_model.lm_head")
    assert config.is_ignored("merger.linear_1")
    assert not config.is_ignored("vision_tower_2.fc1")
    assert not config.is_ignored("language_model.model.layers.0.mlp.down_proj")


def test_fused_layers_are_ignored_whole_or_not_at_all() -> None:
    layer = "language_model.model.layers.0.self_attn"
    config = QigConfig.from_config(quantization_config(ignore=[f"{layer}.{p}_proj" for p in "qkv"]))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert config.is_ignored(f"{layer}.qkv_proj")
    config.ignored.remove(f"{layer}.k_proj")
    with pytest.raises(ValueError, match="quantize all or none"):
        config.is_ignored(f"{layer}.qkv_proj")


@pytest.mark.parametrize(("scheme", "k"), [("w3a16", 768), ("w4a8", 192)])
def test_uneven_tensor_parallel_split_names_sizes_that_work(scheme: str, k: int) -> None:
    method = QigLinearMethod(QigConfig.from_config(quantization_config(scheme)), "m.down_proj")
    with pytest.raises(ValueError, match=f"{k} inputs split 4 ways.*size of 1 or 2$"):
        check_shape(method.backend, method.scheme, method.prefix, 256, k // 4, k, torch.bfloat16)


def test_unsupported_size_names_the_layer() -> None:
    method = QigLinearMethod(QigConfig.from_config(quantization_config()), "m.q_proj")
    with pytest.raises(ValueError, match=r"m\.q_proj: w3a16 needs an input size"):
        check_shape(method.backend, method.scheme, method.prefix, 256, 200, 200, torch.bfloat16)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 12, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.int32)],
    ids=["another-dtype", "more-columns"],
)
def test_wrong_tensors_are_not_cast_or_cut(tensor: torch.Tensor) -> None:
    config = QigConfig.from_config(quantization_config())
    loaded: list[torch.Tensor] = []
    load = checked(
        lambda parameter, t: loaded.append(t),
        "m.weight_packed",
        tensor_specs(config.scheme, 4, 128)["weight_packed"],
    )
    with pytest.raises(ValueError, match=r"m\.weight_packed: the checkpoint has .* 12 columns"):
        load(torch.nn.Parameter(torch.zeros(1)), tensor)
    good = torch.zeros(4, 12, dtype=torch.int32)
    load(torch.nn.Parameter(torch.zeros(1)), good)
    assert loaded == [good]


def test_missing_scales_are_noticed() -> None:
    """vLLM does not miss a quantized tensor that the checkpoint lacks; the scales stay zero."""
    method = QigLinearMethod(QigConfig.from_config(quantization_config()), "m.q_proj")
    layer = torch.nn.Module()
    layer.qig_n, layer.qig_k, layer.qig_dtype = 4, 128, torch.bfloat16
    for name, spec in tensor_specs(method.scheme, 4, 128).items():
        dtype = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
        parameter = torch.nn.Parameter(torch.zeros(spec.shape, dtype=dtype), requires_grad=False)
        layer.register_parameter(name, parameter)
    with pytest.raises(ValueError, match=r"m\.q_proj\.weight_scale: .* inspect --verify"):
        method.process_weights_after_loading(layer)


def test_dummy_weights_have_scales_of_either_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM fills them with small random numbers, for timing: no sign of a damaged checkpoint."""
    config = QigConfig.from_config(quantization_config("w4a8"))
    method = QigLinearMethod(config, "m.q_proj", dummy=True)
    layer = stored_layer(method, 4, 128)
    layer.weight_scale.data.uniform_(-1e-3, 1e-3)
    layer.weight_scale.data[0] = 0
    prepared: list[dict[str, torch.Tensor]] = []

    def prepare(scheme: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        prepared.append(dict(tensors))
        return tensors

    monkeypatch.setattr(method.backend, "prepare", prepare)
    monkeypatch.setattr(method.backend, "warm_up", lambda *arguments: None)
    method.process_weights_after_loading(layer)
    assert bool((prepared[0]["weight_scale"] > 0).all())


def stored_layer(method: QigLinearMethod, n: int, k: int) -> torch.nn.Module:
    """A layer as vLLM's loader leaves it: random codes and positive scales."""
    layer = torch.nn.Module()
    layer.qig_n, layer.qig_k, layer.qig_dtype = n, k, torch.bfloat16
    for name, spec in tensor_specs(method.scheme, n, k).items():
        if spec.dtype == "int32":
            data = torch.randint(-(1 << 31), 1 << 31, spec.shape, dtype=torch.int32)
        elif spec.dtype == "uint8":
            data = torch.randint(0, 8, spec.shape, dtype=torch.uint8)
        else:
            dtype = torch.bfloat16 if spec.dtype == "model" else getattr(torch, spec.dtype)
            data = torch.rand(spec.shape).to(dtype) + 0.5
        layer.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
    return layer


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_gpu_layer_is_ready_when_its_weights_are_processed(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before vLLM profiles memory: every shape warmed up, one scratch memory for all layers.

    The GPU's kernels are handed CPU tensors here, so that only compiling and running is missing.
    """
    from qig_serve.kernels import launch, ops, self_check, tiles

    monkeypatch.setattr(self_check, "known", lambda job: "")
    monkeypatch.setattr("qig_serve.vllm_plugin.linear.kernel_backend", lambda: ops)
    warmed: list[LinearJob] = []
    monkeypatch.setattr(ops, "warm_up", warmed.append)
    launch.scratch_of.cache_clear()
    for name, n, k in (("qkv_proj", 300, 256), ("down_proj", 128, 384)):
        config = QigConfig.from_config(quantization_config(scheme))
        method = QigLinearMethod(config, f"m.{name}")
        layer = stored_layer(method, n, k)
        method.process_weights_after_loading(layer)
        assert warmed[-1] == (method.scheme, n, k, torch.bfloat16, torch.device("cpu"), False)
        assert launch.scratch_of.cache_info().currsize == 1, (
            "one scratch memory, whatever the layer"
        )
        names = {name for name, _ in layer.named_parameters()}
        assert any(name.startswith("qig_") for name in names) and "weight_packed" not in names
    device = torch.device("cpu")
    largest = max(
        launch.scratch_size(tile, launch.multiprocessors(device))
        for (architecture, _, _), rows in tiles.tile_table().items()
        if architecture == launch.INTERPRETER_ARCHITECTURE
        for _, tile in rows
    )
    assert launch.scratch(device).partials.numel() == largest > 0


@pytest.mark.parametrize(
    ("capability", "n", "k", "reason"),
    [
        ((7, 5), 256, 256, "need compute capability 8.0 or newer, this one has 7.5"),
        ((9, 0), 1 << 20, 1 << 12, "must stay below 2^31"),
        (None, 256, 256, "need a CUDA device, and none was found"),
    ],
)
def test_what_the_gpu_kernels_refuse_stops_the_load_with_the_reason(
    capability: tuple[int, int] | None,
    n: int,
    k: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qig_serve.kernels import ops

    linear = "qig_serve.vllm_plugin.linear"
    monkeypatch.setattr(f"{linear}.kernel_backend", lambda: ops)
    monkeypatch.setattr(f"{linear}.device_capability", lambda: capability)
    method = QigLinearMethod(QigConfig.from_config(quantization_config()), "m.layers.3.o_proj")
    with pytest.raises(ValueError, match=r"^m\.layers\.3\.o_proj: .*" + re.escape(reason)):
        method.create_weights(
            torch.nn.Module(), k, [n], k, n, torch.bfloat16, weight_loader=lambda *_: None
        )
