"""Answers through vLLM in this process: several models one after another, threads put back."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from qig_serve.demo import MODEL_DIR
from qig_serve.demo.model import load_model, save_model
from qig_serve.evaluate import evaluate_many, load_samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_vllm_and_transformers_answer_alike(tmp_path: Path) -> None:
    """On a trained model: an untrained one may answer in halves of characters, which vLLM holds
    back and transformers shows as replacement characters."""
    import torch

    full, noisy = MODEL_DIR, tmp_path / "noisy"
    model, processor = load_model(full)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and "proj.weight" in name:
                weight.add_(torch.randn_like(weight) * 0.4 * weight.std())
    save_model(model, processor, noisy)
    samples = load_samples("demo:dev", 24)
    before = (os.sched_getaffinity(0), torch.get_num_threads())
    reported: set[tuple[str, int]] = set()
    found = {
        engine: evaluate_many(
            [("noisy", noisy)],
            full,
            samples,
            engine=engine,  # type: ignore[arg-type]
            kl_samples=0,
            max_tokens=4,
            progress=lambda what, done, _: reported.add((what, done)),
        )
        for engine in ("vllm", "transformers")
    }
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    assert {("full precision: answers (vllm)", 24), ("noisy: answers (vllm)", 24)} <= reported
    for name in ("fp", "noisy"):
        pairs = zip(found["vllm"][name].answers, found["transformers"][name].answers, strict=True)
        same = sum(a.output == b.output for a, b in pairs)
        # bf16 sums in another order: a near tie may fall either way.
        assert same >= 20, name
    outputs = [found["vllm"][n].answers for n in ("fp", "noisy")]
    assert outputs[0] != outputs[1]  # the second model was really loaded
