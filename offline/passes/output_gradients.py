"""How answers move with what the blocks put out: the output side of rounding.

An error E of a weight costs about tr(F E H E^T) of the answers' divergence, with H the second
moments of the linear's inputs and F those of the answers' gradients at its outputs (K-FAC, arXiv
1503.05671; for rounding YAQA, arXiv 2505.22988). The gradients are those of v . logits summed over
answers' tokens, v drawn anew for each token with the covariance

    C = diag(p) - p p^T,        p: the mean prediction of the full-precision model there,

the Fisher information of a softmax. With each token's own prediction instead of the mean, the few
tokens at which the model is unsure decide alone.

One sweep forward and one back, a block at a time, before the first block is rounded: what is kept
is one gradient of each token behind each block, in 16 bits, of as many samples as BYTES hold. When
its turn comes a block is run once more, from there to the outputs of its linears.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qig_serve.offline.calibration.batches import TEXT, CalibrationBatch
from qig_serve.offline.passes.capture import Store, check_finite, first_output
from qig_serve.offline.passes.hessian import add_products
from qig_serve.offline.passes.shared_keys import TrackedKeys
from qig_serve.offline.passes.streams import OutputGradients, Streams
from qig_serve.offline.processes import Ranks
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.source.stand_ins import SHARED

BYTES = 8 << 30
"""Of the gradients that wait, of each process."""
TOKENS = 4096
"""Of answers, each with its own draw, that are enough; samples with few are drawn several times."""
MOST_DRAWS = 16


def planned(
    loaded: LoadedModel, batches: Sequence[CalibrationBatch], ranks: Ranks
) -> tuple[tuple[int, ...], int]:
    """The batches whose gradients are followed, and how many draws of each of them."""
    room = BYTES // bytes_per_token(loaded)
    chosen: list[int] = []
    tokens = 0
    for b, batch in enumerate(batches):
        if not chosen or tokens + batch.token_mask.numel() <= room:
            chosen.append(b)
            tokens += batch.token_mask.numel()
    (answers,) = ranks.total(sum(int(said(batches[b]).sum()) for b in chosen))
    most = torch.tensor([tokens])  # of any process: all draw equally often
    ranks.maximum(most)
    draws = min(MOST_DRAWS, math.ceil(TOKENS / max(answers, 1)), room // int(most))
    return tuple(chosen), max(1, draws)


def bytes_per_token(loaded: LoadedModel) -> int:
    """What one draw keeps of a token that is followed."""
    return 2 * loaded.num_blocks * int(loaded.text_config.hidden_size)


def said(batch: CalibrationBatch) -> torch.Tensor:
    """Tokens behind which a token of the answer follows, bool [B, T].

    Of text, in a batch without answers.
    """
    wanted = batch.answer_mask if bool(batch.answer_mask.any()) else batch.modality == TEXT
    return nn.functional.pad(wanted[:, 1:], (0, 1))


def prepare(
    loaded: LoadedModel,
    streams: Streams,
    seed: int,
    first: int = 0,
    step: Callable[[str], None] = lambda text: None,
) -> OutputGradients:
    """Gradients behind the blocks from `first` on; `streams` stand before block 0, and stay there.

    `step` is told what is being done.
    """
    started, count, device = time.monotonic(), loaded.num_blocks, streams.device
    chosen, draws = planned(loaded, streams.batches, streams.ranks)
    found = OutputGradients(
        chosen, draws, tuple(streams.new_store(f"gradients-{i}") for i in range(count))
    )
    before = [streams.new_store(f"before-{i}") for i in range(count)]
    states = streams.new_store("states")
    with torch.no_grad():
        for index in range(count):
            step(f"sweep forward: block {index + 1}/{count}")
            block = loaded.block(index)
            for b in chosen:
                hidden = (states if index else streams.fp).get(b, device)
                if index >= first:
                    before[index].put(b, hidden.bfloat16())
                kwargs = streams.inputs[b].kwargs(index)
                output = first_output(block(hidden, **kwargs))
                check_finite(output, f"layer {index}, full-precision output")
                states.put(b, output)
    step("sweep: output head")
    last = _behind_the_last(loaded, streams, states, chosen, draws, seed)
    for index in reversed(range(first, count)):
        step(f"sweep back: block {index + 1}/{count}")
        block = loaded.block(index).requires_grad_(False)
        for b in chosen:
            hidden = before[index].get(b, device).float().requires_grad_()
            output = _run(block, hidden, streams.inputs[b].kwargs(index), device)
            for key in found.keys(b):
                gradient = last.get(key, device)
                found.behind[index].put(key, gradient.bfloat16())
                (gradient,) = torch.autograd.grad(output, hidden, gradient, retain_graph=True)
                last.put(key, gradient)
        before[index].clear()
    for store in (states, last):
        store.clear()
    return replace(found, seconds=time.monotonic() - started)


def stand_in(
    loaded: LoadedModel, streams: Streams, batches: Sequence[CalibrationBatch]
) -> tuple[OutputGradients, float]:
    """For a dry run of one block: gradients of noise behind it, as many as there will be.

    `batches` are all of the run, and `streams` some of them. Returns with the gradients which part
    of all tokens is followed.
    """
    chosen, draws = planned(loaded, batches, streams.ranks)
    found = OutputGradients(tuple(range(len(streams))), draws, (streams.new_store("gradients-0"),))
    for b in found.batches:
        for key in found.keys(b):
            noise = torch.randn_like(streams.fp.get(b, "cpu"), dtype=torch.bfloat16)
            found.behind[0].put(key, noise)
    followed = sum(batches[b].token_mask.numel() for b in chosen)
    return found, followed / sum(batch.token_mask.numel() for batch in batches)


def _behind_the_last(
    loaded: LoadedModel,
    streams: Streams,
    states: Store,
    chosen: Sequence[int],
    draws: int,
    seed: int,
) -> Store:
    """Gradients of the drawn combinations of logits with respect to the last hidden states."""
    device = streams.device
    rows = loaded.rows_at_once
    loaded.model.to(device)
    total = torch.zeros(loaded.vocabulary, device=device)
    spoken_at = {b: said(streams.batches[b]).to(device) for b in chosen}
    for b, mask in spoken_at.items():
        for part in states.get(b, device)[mask].split(rows):
            with torch.no_grad():
                total += loaded.logits(part).float().softmax(-1).sum(0)
    streams.ranks.sum(total)
    p = total / total.sum().clamp(min=1e-30)
    root = p.sqrt()
    found = streams.new_store("last")
    for b, mask in spoken_at.items():
        hidden = states.get(b, device)
        for draw in range(draws):
            gradient = torch.zeros_like(hidden)
            # By sample, so that any number of processes draws the same.
            generators = [_generator(seed, draw, name) for name in streams.batches[b].ids]
            samples = mask.nonzero()[:, 0].cpu().split(rows)
            parts = []
            for part, whose in zip(hidden[mask].split(rows), samples, strict=True):
                drawn = [torch.randn(len(p), generator=generators[i]) for i in whose.tolist()]
                noise = torch.stack(drawn).to(device)
                v = root * noise - p * (noise @ root)[:, None]
                with torch.enable_grad():
                    part = part.detach().requires_grad_()
                    spoken = (loaded.logits(part).float() * v).sum()
                parts.append(torch.autograd.grad(spoken, part)[0])
            if parts:
                gradient[mask] = torch.cat(parts).to(gradient.dtype)
            found.put(b * draws + draw, gradient)
    loaded.model.to("cpu")
    return found


def _generator(seed: int, draw: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _run(
    block: nn.Module, hidden: torch.Tensor, kwargs: Mapping[str, Any], device: torch.device
) -> torch.Tensor:
    given = dict(kwargs)
    if SHARED in given:  # other blocks' keys and values, of which no gradient is followed
        given[SHARED] = TrackedKeys(given[SHARED], device)
    with torch.enable_grad():
        return first_output(block(hidden, **given))


def output_moments(
    block: nn.Module, names: Sequence[str], streams: Streams
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """F of the block at hand, of two halves of the samples: name of a linear -> [N, N] fp32 twice.

    The mean of the diagonal of their sum is 1. `block` is equalized and not rounded yet; `names`
    are linears that every token passes.
    """
    gradients = streams.output_gradients
    assert gradients is not None
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    parts: list[torch.Tensor] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            def add(gradient: torch.Tensor) -> None:
                n = gradient.shape[-1]
                if name not in found:
                    first, second = torch.zeros(2, n, n, device=gradient.device)
                    found[name] = first, second
                for moments, part in zip(found[name], parts, strict=True):
                    rows = gradient.reshape(-1, n)[part].float()
                    add_products(moments, rows, rows)

            output.register_hook(add)

        return hook

    handles = [block.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    try:
        for b in gradients.batches:
            batch = streams.batches[b]
            half = batch.half.repeat_interleave(batch.token_mask.shape[1]).to(streams.device)
            parts[:] = ~half, half
            hidden = streams.fp.get(b, streams.device).requires_grad_()
            output = _run(block, hidden, streams.kwargs(b), streams.device)
            for key in gradients.keys(b):
                behind = gradients.behind[streams.index].get(key, streams.device)
                torch.autograd.grad(output, hidden, behind.to(output.dtype), retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    gradients.behind[streams.index].clear()
    for _, halves in sorted(found.items()):  # all processes in one order
        for moments in halves:
            streams.ranks.sum(moments)
        mean = (halves[0].diagonal() + halves[1].diagonal()).mean().clamp(min=1e-30)
        for moments in halves:
            moments /= mean
    return found
