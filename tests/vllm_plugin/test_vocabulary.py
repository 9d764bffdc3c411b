"""Output head and embedding in 8 bits: vLLM's own layers with the plugin's method, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from test_plugin import quantization_config
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from qig_serve import packing
from qig_serve.formats import VOCABULARY_SCHEME
from qig_serve.vllm_plugin.config import QigConfig
from qig_serve.vllm_plugin.embedding import QigEmbeddingMethod

HEAD, EMBEDDING = "lm_head", "model.language_model.embed_tokens"
N, K = 100, 256
"""vLLM pads the rows to 128."""


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def config(eight_bit: list[str], ignore: list[str]) -> QigConfig:
    made = QigConfig.from_config(quantization_config(ignore=ignore, eight_bit=eight_bit))
    made.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={
                "model.language_model.": "language_model.model.",
                "lm_head.": "language_model.lm_head.",
            }
        )
    )
    return made


def layer(kind: type, made: QigConfig, dtype: torch.dtype, prefix: str | None = None) -> Any:
    """A layer of vLLM's that is on its own."""
    name = "lm_head" if kind is ParallelLMHead else "model.embed_tokens"
    prefix = f"language_model.{name}" if prefix is None else prefix
    options = {"params_dtype": dtype, "quant_config": made, "prefix": prefix}
    return kind(N, K, disable_tp=True, **options)


def table(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is stored, and the weight that it stands for."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05
    stored = packing.pack_rows(weight, VOCABULARY_SCHEME)
    return stored, packing.unpack_rows(stored, VOCABULARY_SCHEME, torch.float32)


def load(made: Any, stored: dict[str, torch.Tensor]) -> None:
    for suffix, tensor in stored.items():
        parameter = getattr(made, suffix)
        parameter.weight_loader(parameter, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_and_embedding_of_their_own(dtype: torch.dtype) -> None:
    made = config([HEAD, EMBEDDING], [])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for kind, seed in ((ParallelLMHead, 1), (VocabParallelEmbedding, 2)):
        built = layer(kind, made, dtype)
        stored, weight = table(seed)
        load(built, stored)
        built.quant_method.process_weights_after_loading(built)
        held = sum(p.nbytes for p in built.parameters())
        assert held < 1.1 * 128 * K, "8 bits per weight are held"
        if kind is VocabParallelEmbedding:
            ids = torch.tensor([[3, 99], [0, 3]])
            assert torch.equal(built(ids), weight[ids].to(dtype))
            continue
        for m in (1, 70):
            x = torch.randn(m, K).to(dtype)
            logits = built.quant_method.apply(built, x)
            assert logits.shape == (m, 128) and logits.dtype == dtype
            assert not logits[:, N:].any(), "padding"
            expected = x.float() @ weight.t()
            error = (logits[:, :N].float() - expected).norm() / expected.norm()
            assert float(error) < tolerance


@pytest.mark.parametrize("by_vllm", [False, True], ids=["the-method", "the-layer"])
def test_a_tied_model_has_one_table(by_vllm: bool) -> None:
    """Also where the layer ties itself, as older vLLMs have it."""
    made = config([EMBEDDING], ["model.norm"])
    embedding = layer(VocabParallelEmbedding, made, torch.float32)
    head = layer(ParallelLMHead, made, torch.float32)
    assert not list(head.parameters())
    if by_vllm:
        head.weight = embedding.weight
    else:
        assert head.tie_weights(embedding) is head
    stored, weight = table()
    load(embedding, stored)
    for built in (head, embedding):  # in either order
        built.quant_method.process_weights_after_loading(built)
    x = torch.randn(3, K)
    torch.testing.assert_close(head.quant_method.apply(head, x)[:, :N], x @ weight.t())
    assert not list(head.parameters())


def test_a_head_without_a_table_is_noticed() -> None:
    made = config([EMBEDDING], [])
    head = layer(ParallelLMHead, made, torch.float32)
    with pytest.raises(ValueError, match=r"lm_head: the checkpoint has no tensors for the output"):
        head.quant_method.process_weights_after_loading(head)


def test_missing_scales_are_noticed() -> None:
    head = layer(ParallelLMHead, config([HEAD], [EMBEDDING]), torch.float32)
    with pytest.raises(ValueError, match=r"lm_head\.weight_scale: .* inspect --verify"):
        head.quant_method.process_weights_after_loading(head)


def test_dummy_weights() -> None:
    method = QigEmbeddingMethod("lm_head", dummy=True)
    made = layer(ParallelLMHead, config([HEAD], [EMBEDDING]), torch.float32)
    made.weight_scale.data.uniform_(-1e-3, 1e-3)
    method.process_weights_after_loading(made)
    assert torch.isfinite(method.apply(made, torch.randn(2, K))).all()


@pytest.mark.parametrize(
    ("eight_bit", "ignore", "eight"),
    [
        ([HEAD], [EMBEDDING], {ParallelLMHead}),
        ([EMBEDDING], [HEAD], {VocabParallelEmbedding}),
        ([], [HEAD, EMBEDDING], set()),
        ([], [EMBEDDING], set()),  # tied, in 16 bits
    ],
    ids=["head", "embedding", "none", "tied-16"],
)
def test_what_is_not_in_8_bits_is_vllms(
    eight_bit: list[str], ignore: list[str], eight: set[type]
) -> None:
    made = config(eight_bit, ignore)
    for kind in (ParallelLMHead, VocabParallelEmbedding):
        method = layer(kind, made, torch.float32).quant_method
        wanted = QigEmbeddingMethod if kind in eight else UnquantizedEmbeddingMethod
        assert isinstance(method, wanted)
    nameless = layer(VocabParallelEmbedding, made, torch.float32, prefix="")
    assert isinstance(nameless.quant_method, QigEmbeddingMethod) == (
        VocabParallelEmbedding in eight
    )


def test_two_ranks_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding follows each rank's rows; together they are the whole table."""
    made = config([HEAD, EMBEDDING], [])
    stored, weight = table()
    x, ids = torch.randn(2, K), torch.arange(N)
    logits, rows = [], []
    for rank in range(2):
        module = "vllm.model_executor.layers.vocab_parallel_embedding"
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: 2)
        monkeypatch.setattr(f"{module}.tensor_model_parallel_all_reduce", lambda part: part)
        options = {"params_dtype": torch.float32, "quant_config": made}
        head = ParallelLMHead(N, K, prefix="language_model.lm_head", **options)
        embedding = VocabParallelEmbedding(
            N, K, prefix="language_model.model.embed_tokens", **options
        )
        for built in (head, embedding):
            load(built, stored)
            built.quant_method.process_weights_after_loading(built)
        logits.append(head.quant_method.apply(head, x))
        rows.append(embedding(ids))
    torch.testing.assert_close(torch.cat(logits, 1)[:, :N], x @ weight.t())
    torch.testing.assert_close(rows[0] + rows[1], weight)


def test_wrong_tensors_are_not_cast() -> None:
    head = layer(ParallelLMHead, config([HEAD], [EMBEDDING]), torch.float32)
    with pytest.raises(ValueError, match=r"weight_packed: the checkpoint has torch\.int8"):
        head.weight_packed.weight_loader(head.weight_packed, torch.zeros(N, K, dtype=torch.int8))
