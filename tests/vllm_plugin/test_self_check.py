"""Kernels that compute something else are noticed before anything is served, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from test_experts import load as load_experts
from test_experts import make_layer, named, stored_experts
from test_plugin import quantization_config, stored_layer
from test_vocabulary import HEAD, N, config, layer, table
from test_vocabulary import load as load_table
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from qig_serve.kernels import cpu, cpu_experts, self_check
from qig_serve.vllm_plugin import embedding
from qig_serve.vllm_plugin.config import QigConfig
from qig_serve.vllm_plugin.linear import QigLinearMethod


@pytest.fixture(autouse=True)
def nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_faults", {})


def wrong(function: Any) -> Any:
    """A third of it is missing."""

    def wrong(*arguments: Any) -> torch.Tensor:
        out: torch.Tensor = function(*arguments).clone()
        out[..., ::3] = 0
        return out

    return wrong


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_right_linears_pass_and_wrong_ones_stop_the_load(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = QigLinearMethod(QigConfig.from_config(quantization_config(scheme)), "m.q_proj")

    def processed(n: int = 192) -> None:
        built = stored_layer(method, n, 256)
        built.qig_dtype = dtype
        if method.scheme.group_size is not None:
            built.weight_scale.data = built.weight_scale.data.to(dtype)
        method.process_weights_after_loading(built)

    processed()
    monkeypatch.setattr(cpu, "linear", wrong(cpu.linear))
    processed()  # of a shape that was checked
    for _ in range(2):  # and whoever tries again in the same process
        with pytest.raises(ValueError, match=r"m\.q_proj: the kernels of .* off on this processor"):
            processed(64)

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(cpu, "linear", fails)
    with pytest.raises(ValueError, match=r"do not run on .*: out of resource.*: quantize with"):
        processed(128)


@pytest.mark.usefixtures("options", "no_stance")
def test_wrong_experts_stop_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = named(stored_experts("w3a16"))
    load_experts(make_layer("w3a16"), stored)
    monkeypatch.setattr(self_check, "_faults", {})
    monkeypatch.setattr(cpu_experts, "apply", wrong(cpu_experts.apply))
    with pytest.raises(ValueError, match=r"mlp\.experts: the kernels of w3a16 experts are .* off"):
        load_experts(make_layer("w3a16"), stored)


@pytest.mark.parametrize("kind", [ParallelLMHead, VocabParallelEmbedding])
@pytest.mark.parametrize("part", ["linear", "embedding"])
def test_a_table_is_held_in_16_bits_then(
    kind: type, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    said: list[str] = []
    monkeypatch.setattr(embedding._logger, "warning", lambda text, *of: said.append(text % of))
    name = HEAD if kind is ParallelLMHead else "model.language_model.embed_tokens"
    with set_current_vllm_config(VllmConfig()):
        for seed in (0, 1, 2):  # right, wrong, and known to be wrong
            if seed == 1:
                assert not said
                monkeypatch.setattr(self_check, "_faults", {})
                monkeypatch.setattr(cpu, part, wrong(getattr(cpu, part)))
            built = layer(kind, config([name], []), torch.float32)
            stored, weight = table(seed)
            load_table(built, stored)
            built.quant_method.process_weights_after_loading(built)
            x, ids = torch.randn(3, weight.shape[1]), torch.tensor([5, 99, 0])
            logits = built.quant_method.apply(built, x)[:, :N]
            torch.testing.assert_close(logits, x @ weight.t(), rtol=1e-4, atol=1e-4)
            assert torch.equal(built.quant_method.embedding(built, ids), weight[ids])
    assert len(said) == 2 and all("is held in 16 bits: the " in text for text in said)
