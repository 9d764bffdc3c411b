"""KL on answer tokens against one plain forward per sample, without padding or batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qig_serve.evaluate import load_samples
from qig_serve.evaluation.divergence import Divergence, divergences
from qig_serve.evaluation.models import answer_text, load_model, prompt_text
from qig_serve.model_directory import load_processor
from qig_serve.samples import Sample, load_image


def _forced(directory: Path, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [answer tokens, vocabulary] that predict the answer and <|im_end|>, the tokens, and
    the last states [answer tokens, width]."""
    processor = load_processor(directory)
    prompt = prompt_text(processor, sample)
    inputs = processor(
        text=[prompt + (sample.answer or "") + "<|im_end|>"],
        images=[load_image(i) for i in sample.images] or None,
        return_tensors="pt",
    )
    start = len(processor.tokenizer(prompt)["input_ids"]) + 35 * len(sample.images)
    with torch.no_grad():
        out = load_model(directory, torch.float32)(**inputs, output_hidden_states=True)
    rows = slice(start - 1, -1)
    return out.logits[0, rows], inputs["input_ids"][0, start:], out.hidden_states[-1][0, rows]


@pytest.fixture(scope="module")
def mixed() -> list[Sample]:
    """Short and long answers, and one question without a picture."""
    samples = load_samples("demo:dev", 16)
    text = [p for p in samples[0].messages[0]["content"] if p["type"] == "text"]
    return [*samples, Sample("t", "text", ({"role": "user", "content": text},), "red")]


def test_equals_the_plain_computation(twins: tuple[Path, Path], mixed: list[Sample]) -> None:
    full, noisy = twins
    ((name, found),) = divergences(full, [("noisy", noisy)], mixed, lambda *_: None)
    kl, same, ratio, states, by_type = [], [], [], [], {}
    for sample in mixed:
        p, tokens, wanted = _forced(full, sample)
        q, _, given = _forced(noisy, sample)
        states.append((given - wanted).square().sum(-1) / wanted.square().sum(-1))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        by_type.setdefault(sample.type, []).append(kl[-1])
        same.append(p.argmax(-1) == q.argmax(-1))
        at = tokens[:, None]
        ratio.append((p.gather(1, at) - q.gather(1, at))[:, 0])
    flat = torch.cat(kl)
    assert name == "noisy" and found.samples == 17 and found.tokens == len(flat)
    assert found.kl_mean == pytest.approx(float(flat.mean()), rel=1e-3)
    assert found.state_error == pytest.approx(float(torch.cat(states).mean()), rel=1e-3)
    assert found.state_error_se is not None and 0 < found.state_error_se < found.state_error
    assert found.kl_max == pytest.approx(float(flat.max()), rel=1e-3)
    assert found.kl_median == pytest.approx(float(flat.median()), rel=1e-3)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()))
    assert found.perplexity_ratio == pytest.approx(float(torch.cat(ratio).mean().exp()), rel=1e-3)
    assert found.kl_by_type["text"] == pytest.approx(float(kl[-1].mean()), rel=1e-3)
    means = {kind: float(torch.cat(values).mean()) for kind, values in by_type.items()}
    assert found.kl_by_type == pytest.approx(means, rel=1e-3)
    assert 0 < found.kl_median < found.kl_p99 <= found.kl_max and 0 < found.top1 < 1


def test_a_model_is_at_no_distance_from_itself(
    twins: tuple[Path, Path], mixed: list[Sample]
) -> None:
    full, _ = twins
    reported: list[tuple[str, int, int]] = []
    pairs = divergences(full, [("a", full), ("b", full)], mixed, lambda *t: reported.append(t))
    found: dict[str, Divergence] = dict(pairs)
    for one in found.values():
        assert (
            one.kl_max < 1e-6
            and one.state_error < 1e-9
            and one.top1 == 1
            and one.perplexity_ratio == pytest.approx(1)
        )
    finished = {what for what, done, total in reported if done == total == 17}
    assert finished == {what for what, _, _ in reported} and len(finished) == 3


def test_the_answer_ends_with_the_templates_own_token(twins: tuple[Path, Path]) -> None:
    processor = load_processor(twins[0])
    (sample,) = load_samples("demo:dev", 1)
    prompt = prompt_text(processor, sample)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer_text(processor, sample, prompt) == f"{sample.answer}<|im_end|>"
