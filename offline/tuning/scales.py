"""The last step: with all codes fixed, the scales learn what the full-precision model says.

Rounding looks at one linear at a time; how an error in it moves the answer is seen only at the
output head. So after the last block the scales (and nothing else: codes, zero points and the
format stay) are moved down the gradient of

    KL(full precision || quantized), mean over the text tokens of the calibration samples,

by Adam, for some passes over the samples. Activations are int8 in it where the scheme has them so
(straight-through). Some samples are left out and judge: what does not lower KL on them is not
taken.

Memory: blocks wait packed on the host. A step sends some samples through all blocks, unpacked one
at a time, keeps the hidden states before each, and goes back the same way, running every block a
second time for its gradient.

Source: training of the quantization parameters alone, end to end, after EfficientQAT (arXiv
2407.11062, section 3.3); towards the full-precision model's answers as in NeUQI (arXiv 2505.17595).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qig_serve.offline.calibration.batches import TEXT
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.passes.capture import Store, first_output, quantized_activations
from qig_serve.offline.passes.shared_keys import KeyGradients, TrackedKeys
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.results import TuningReport
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.offline.source.stand_ins import SHARED
from qig_serve.offline.tuning.divergence import divergence
from qig_serve.offline.tuning.kept_blocks import KeptBlock

RATE = 1e-3
"""Adam's step, of factors around 1."""
STEP_SAMPLES = 4
"""Samples of a step, over all processes."""
STEP_TOKENS = 256
"""Tokens of a step whose KL is taken, over all processes: with a vocabulary of 262,144 the head
costs more than all blocks of a small decoder."""
LEFT_OUT = 8
"""One batch of so many judges."""
_WARM_UP = 5


@dataclass
class Tuning:
    """Blocks, samples, and where they stand."""

    loaded: LoadedModel
    blocks: Sequence[KeptBlock]
    streams: Streams
    """After the last block: `fp` is what full precision gives."""
    first: Store
    """What the first block is given, of each batch."""
    before: list[Store]
    """Hidden states before each block, of the batches of the step at hand."""

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        writer: CheckpointWriter | None,
        streams: Streams,
        first: Store,
    ) -> Tuning:
        """Reads the finished blocks back; the output head goes to the device."""
        loaded.model.to(loaded.device)
        count = loaded.num_blocks
        blocks = [KeptBlock(loaded, i, writer, streams.scheme, streams.ranks) for i in range(count)]
        return cls(
            loaded, blocks, streams, first, [streams.new_store(f"before-{i}") for i in range(count)]
        )

    def scales(self) -> dict[str, torch.Tensor]:
        """All scales as they are stored, by their names in the checkpoint."""
        return {
            self.loaded.source_name(index, f"{name}.weight_scale"): scale
            for index, kept in enumerate(self.blocks)
            for name, scale in kept.scales().items()
        }

    def judged(self, b: int) -> torch.Tensor:
        """Tokens of batch b behind which text or an answer's token follows, bool [B, T]."""
        batch = self.streams.batches[b]
        said = (batch.modality == TEXT) | batch.answer_mask
        return torch.nn.functional.pad(said[:, 1:], (0, 1)).to(self.streams.device)

    @torch.no_grad()
    def forward(self, chosen: Sequence[int], keep: bool = True) -> dict[int, torch.Tensor]:
        """Hidden states behind the last block of some batches; those between are kept."""
        device = self.streams.device
        states = {b: self.first.get(b, device) for b in chosen}
        for index, kept in enumerate(self.blocks):
            weights = kept.weights(kept.rounded(device))
            for b in chosen:
                if keep:
                    self.before[index].put(b, states[b])
                kwargs = self.streams.rounded_inputs[b].kwargs(index)
                states[b] = self._run(index, states[b], weights, kwargs)
        return states

    def _run(
        self,
        index: int,
        hidden: torch.Tensor,
        weights: dict[str, torch.Tensor],
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        kept, streams = self.blocks[index], self.streams
        with quantized_activations(kept.linears, streams.quantizes_activations):
            output = torch.func.functional_call(kept.block, weights, (hidden,), dict(kwargs))
        return first_output(output)

    def backward(self, gradients: dict[int, torch.Tensor]) -> None:
        """From gradients of the last hidden states to those of all factors."""
        device = self.streams.device
        keys = {b: KeyGradients() for b in gradients}
        for index in reversed(range(len(self.blocks))):
            kept = self.blocks[index]
            rounded = kept.rounded(device)
            weights = {n: w.requires_grad_() for n, w in kept.weights(rounded).items()}
            totals = [torch.zeros_like(w) for w in weights.values()]
            for b in gradients:
                hidden = self.before[index].get(b, device).requires_grad_()
                kwargs = dict(self.streams.rounded_inputs[b].kwargs(index))
                tracked = TrackedKeys(kwargs.get(SHARED, {}), device)
                if SHARED in kwargs:
                    kwargs[SHARED] = tracked
                with torch.enable_grad():
                    output = self._run(index, hidden, weights, kwargs)
                noted, of_noted = keys[b].of_noted(tracked)
                found = torch.autograd.grad(
                    [output, *noted],
                    [hidden, *weights.values(), *tracked.leaves],
                    [gradients[b], *of_noted],
                    allow_unused=True,  # experts that no token of these samples is routed to
                    materialize_grads=True,
                )
                gradients[b] = found[0]
                for total, gradient in zip(totals, found[1 : 1 + len(totals)], strict=True):
                    total.add_(gradient)
                keys[b].add(tracked, found[1 + len(totals) :])
            for name, total in zip(rounded, totals, strict=True):
                kept.add_gradient(name, rounded[name], total)
            self.before[index].clear()

    def kl(self, chosen: Sequence[int]) -> float:
        """Mean KL over the judged tokens of some batches of all processes."""
        states = self.forward(chosen, keep=False)
        total, count = 0.0, 0
        for b, hidden in states.items():
            mask = self.judged(b)
            wanted = self.streams.fp.get(b, self.streams.device)
            total += divergence(self.loaded, wanted[mask], hidden[mask], back=False)[0]
            count += int(mask.sum())
        total, tokens = self.streams.ranks.total(total, count)
        return total / max(tokens, 1)

    def step(self, masks: dict[int, torch.Tensor]) -> None:
        """Gradients of one step, into the factors' `grad`; masks: tokens [B, T] of its batches."""
        states = self.forward(list(masks))
        (tokens,) = self.streams.ranks.total(sum(int(m.sum()) for m in masks.values()))
        gradients = {}
        for b, hidden in states.items():
            wanted = self.streams.fp.get(b, self.streams.device)
            _, found = divergence(self.loaded, wanted[masks[b]], hidden[masks[b]])
            gradients[b] = torch.zeros_like(hidden)
            gradients[b][masks[b]] = (found / max(tokens, 1)).to(hidden.dtype)
        self.backward(gradients)


def tune(
    tuning: Tuning, passes: int, seed: int, progress: Callable[[int, int], None]
) -> TuningReport:
    """Moves the factors of all blocks; where that does not help samples left out, not at all.

    The same seed, samples and number of processes give the same factors. Nothing is tuned with
    fewer than LEFT_OUT batches in a process: nothing could judge. `progress(done, steps)` is called
    after each step.
    """
    streams = tuning.streams
    judges, learned = split(len(streams))
    few = float(not judges)
    if streams.ranks.total(few)[0]:
        return TuningReport(kept=False)
    before = tuning.kl(judges)
    parameters = [f for kept in tuning.blocks for f in kept.factors.values()]
    schedule = plan(tuning, learned, passes, seed)
    adam = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.98))
    draws = torch.Generator().manual_seed(seed)
    share = max(1, STEP_TOKENS // streams.ranks.size)
    for number, chosen in enumerate(schedule):
        adam.param_groups[0]["lr"] = rate(number, len(schedule))
        adam.zero_grad()
        tuning.step(drawn({b: tuning.judged(b) for b in chosen}, share, draws))
        adam.step()
        progress(number + 1, len(schedule))
    for kept in tuning.blocks:
        kept.settle()
    after = tuning.kl(judges)
    if not after < before:
        for kept in tuning.blocks:
            kept.undo()
    return TuningReport(kept=after < before, steps=len(schedule), kl_before=before, kl_after=after)


def split(batches: int) -> tuple[list[int], list[int]]:
    """Batches that judge, one of LEFT_OUT, and those that are learned from."""
    judges = list(range(LEFT_OUT - 1, batches, LEFT_OUT))
    return judges, [b for b in range(batches) if b % LEFT_OUT != LEFT_OUT - 1]


def plan(tuning: Tuning, learned: Sequence[int], passes: int, seed: int) -> list[list[int]]:
    """The batches of every step; as many steps in every process."""
    streams = tuning.streams
    share = max(1, STEP_SAMPLES // streams.ranks.size)
    shuffled = random.Random(seed)
    steps: list[list[int]] = []
    for _ in range(passes):
        order, chosen, samples = list(learned), [], 0
        shuffled.shuffle(order)
        for b in order:
            chosen.append(b)
            samples += len(streams.batches[b].ids)
            if samples >= share:
                steps.append(chosen)
                chosen, samples = [], 0
        if chosen:
            steps.append(chosen)
    most = torch.tensor([len(steps)])
    streams.ranks.maximum(most)
    return [steps[i % len(steps)] for i in range(int(most))]


def drawn(
    masks: dict[int, torch.Tensor], most: int, generator: torch.Generator
) -> dict[int, torch.Tensor]:
    """At most so many of the masks' tokens, drawn evenly; masks bool [B, T] of some batches."""
    chances = {b: torch.rand(m.shape, generator=generator).to(m.device) for b, m in masks.items()}
    asked = torch.cat([chances[b][mask] for b, mask in masks.items()])
    if len(asked) <= most:
        return masks
    highest = asked.sort().values[most - 1]
    return {b: mask & (chances[b] <= highest) for b, mask in masks.items()}


def rate(step: int, steps: int) -> float:
    """Adam's rate: a few steps of warm-up, then falling to zero."""
    return RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
