"""Gradients of answers behind every block, and what they say of the linears' outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_experts import streams_of

from qig_serve.family_row import expert_number
from qig_serve.offline.passes import output_gradients
from qig_serve.offline.passes.capture import first_output


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_gradients, "MOST_DRAWS", 2)


FAMILIES = ("qwen2_vl", "gemma3", "qwen3_vl_moe", "qwen3_5", "gemma4_e2b")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe"])
def test_each_block_hands_back_what_the_next_was_given(family: str, tmp_path: Path) -> None:
    """Behind a block stands the gradient that the next one's output has at its input."""
    loaded, streams, _ = streams_of(tmp_path, family, token_weights="uniform")
    before = [streams.fp.get(b, "cpu") for b in range(len(streams))]
    found = output_gradients.prepare(loaded, streams, 0)
    assert found.batches == tuple(range(len(streams))) and found.draws == 2
    assert all(torch.equal(streams.fp.get(b, "cpu"), x) for b, x in enumerate(before))
    block = loaded.block(0).requires_grad_(False)
    after = [first_output(block(x, **streams.inputs[b].kwargs(0))) for b, x in enumerate(before)]
    block = loaded.block(1).requires_grad_(False)
    for b in found.batches:
        hidden = after[b].detach().requires_grad_()
        output = first_output(block(hidden, **streams.inputs[b].kwargs(1)))
        said = streams.batches[b].answer_mask
        for key in found.keys(b):
            behind = [store.get(key, "cpu").float() for store in found.behind]
            assert behind[0].shape == hidden.shape and float(behind[0].abs().max()) > 0
            (wanted,) = torch.autograd.grad(output, hidden, behind[1], retain_graph=True)
            near = torch.nn.functional.cosine_similarity(wanted.flatten(), behind[0].flatten(), 0)
            assert near > 0.999  # of what is kept in 16 bits
            first = int(said[0].nonzero()[-1])
            assert not behind[0][0, first:].any()  # no answer's token lies behind it


def test_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        loaded, streams, _ = streams_of(tmp_path, "qwen2_vl", token_weights="uniform")
        found.append(output_gradients.prepare(loaded, streams, seed).behind[0].get(0, "cpu"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_samples_are_as_many_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, streams, _ = streams_of(tmp_path, "qwen2_vl", token_weights="uniform")
    monkeypatch.setattr(output_gradients, "BYTES", 1)
    found = output_gradients.prepare(loaded, streams, 0)
    assert found.batches == (0,) and found.draws == 1


def test_a_run_that_goes_on_finds_those_it_needs(tmp_path: Path) -> None:
    loaded, streams, _ = streams_of(tmp_path, "qwen2_vl", token_weights="uniform")
    said: list[str] = []
    whole = output_gradients.prepare(loaded, streams, 0)
    rest = output_gradients.prepare(loaded, streams, 0, 1, said.append)
    assert torch.equal(rest.behind[1].get(0, "cpu"), whole.behind[1].get(0, "cpu"))
    with pytest.raises(KeyError):
        rest.behind[0].get(0, "cpu")
    assert said[0] == "sweep forward: block 1/2" and said[-1] == "sweep back: block 2/2"


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_every_linear_that_all_tokens_pass(family: str, tmp_path: Path) -> None:
    loaded, streams, _ = streams_of(tmp_path, family, token_weights="uniform")
    streams.output_gradients = output_gradients.prepare(loaded, streams, 0)
    for index in range(loaded.num_blocks):
        original = loaded.block(index)
        groups = loaded.groups(original)
        names = [n for g in groups for n in g.linears if expert_number(n) is None]
        found = output_gradients.output_moments(original, names, streams)
        assert set(found) == set(names)
        for name, (first, second) in found.items():
            moments = first + second
            assert moments.shape[0] == original.get_submodule(name).out_features
            assert float(moments.diagonal().mean()) == pytest.approx(1, abs=1e-4)
            assert torch.equal(moments, moments.T)
            assert float(torch.linalg.eigvalsh(moments.double()).min()) > -1e-4
            assert first.any() and second.any()  # each half of the samples
        streams.advance(original, original, [], f"layer {index}")
