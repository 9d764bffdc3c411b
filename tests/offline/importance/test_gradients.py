"""Other sources of token weights: answer gradients (MBQ), attention, and what they must ignore."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.blocks import make_block
from transformers import Qwen2Config, Qwen2ForCausalLM

from qig_serve.errors import UserError
from qig_serve.offline.importance.attention import attention_importance
from qig_serve.offline.importance.gradients import (
    answer_gradients,
    answer_loss,
    modality_importance,
    modality_means,
)
from qig_serve.offline.passes.capture import catch_call


def make_batch(answered: bool = True) -> SimpleNamespace:
    torch.manual_seed(0)
    modality = torch.tensor([[0, 2, 2, 2, 1, 1, 0, 1, 1, 0]] * 2, dtype=torch.int8)
    answer = torch.zeros(2, 10, dtype=torch.bool)
    answer[:, 7:9] = answered
    return SimpleNamespace(
        inputs={"input_ids": torch.randint(0, 64, (2, 10))},
        modality=modality,
        token_mask=modality != 0,
        answer_mask=answer,
    )


def tiny() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


def test_gradients_are_those_of_the_answer_loss() -> None:
    model, batch = tiny(), make_batch()
    ids = batch.inputs["input_ids"]
    layers = model.model.layers
    found = answer_gradients(
        model, lambda b: model(input_ids=ids).logits, [batch], layers, [["self_attn", "mlp"]] * 2
    )
    assert set(found.magnitude) == {f"{i}.{n}" for i in (0, 1) for n in ("self_attn", "mlp")}

    kept = {}

    def hook(module, args, output):  # type: ignore[no-untyped-def]
        output.retain_grad()
        kept["y"] = output

    layers[0].mlp.requires_grad_(True)
    handle = layers[0].mlp.register_forward_hook(hook)
    logits = model(input_ids=ids).logits
    loss = sum(-logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(7, 9))
    loss.backward()
    handle.remove()
    expected = kept["y"].grad.abs().mean(-1)
    torch.testing.assert_close(found.of(0, "mlp")[0], expected, rtol=1e-3, atol=1e-7)


def test_no_answer_anywhere_is_an_error() -> None:
    model, batch = tiny(), make_batch(answered=False)
    with pytest.raises(UserError, match="no calibration sample has an answer"):
        answer_gradients(
            model,
            lambda b: model(input_ids=batch.inputs["input_ids"]).logits,
            [batch],
            model.model.layers,
            [["mlp"]] * 2,
        )


def test_loss_reads_answer_tokens_only() -> None:
    batch = make_batch()
    ids = batch.inputs["input_ids"]
    logits = torch.randn(2, 10, 64)
    other = ids.clone()
    other[:, :7] = 0
    other[:, 9:] = 0
    assert answer_loss(logits, ids, batch.answer_mask) == answer_loss(
        logits, other, batch.answer_mask
    )


def test_modality_means_and_weights() -> None:
    batch = make_batch()
    values = torch.zeros(2, 10)
    values[batch.modality == 1] = 3.0
    values[batch.modality == 2] = 5.0
    values[batch.modality == 0] = 1e6  # the template has no say
    means = modality_means({0: values}, [batch])
    assert means == {1: 3.0, 2: 5.0}
    weights = modality_importance(means, batch.modality, batch.token_mask)
    assert torch.equal(weights, torch.where(batch.token_mask, values, 0.0))


def test_attention_received() -> None:
    block, kwargs, x = make_block()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 10:] = False
    call = catch_call(block, block.self_attn, x, kwargs)
    before = block.self_attn.config._attn_implementation
    received = attention_importance(block.self_attn, call, mask)
    assert block.self_attn.config._attn_implementation == before
    # Every real query hands out 1; keys after it get nothing.
    torch.testing.assert_close(received.sum(-1), torch.ones(2))
    assert float(received[:, 10:].max()) == 0
    assert float(received[:, 0].min()) > float(received[:, 9].max())
