"""Answers found by teacher forcing are those that generation gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from qig_serve.demo import MODEL_DIR
from qig_serve.errors import UserError
from qig_serve.evaluate import REFERENCE, evaluate_many, load_samples
from qig_serve.evaluation.forced import OTHER
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe


def test_forced_answers_equal_generated_ones(tmp_path: Path) -> None:
    rtn = tmp_path / "rtn"
    quantize(MODEL_DIR, rtn, QuantRecipe(method="rtn", calib="demo", samples=2), quiet=True)
    samples = load_samples("demo:dev", 64, 3)
    forced, generated = (
        evaluate_many([("rtn", rtn)], MODEL_DIR, samples, engine=engine, kl_samples=0)
        for engine in ("forced", "transformers")
    )
    known = 0
    for name in (REFERENCE, "rtn"):
        for a, b in zip(forced[name].answers, generated[name].answers, strict=True):
            if a.output != OTHER:
                known += 1
                assert a.output == b.output, a.id
            else:
                assert not b.correct, a.id
    assert 64 < known < 128  # full precision is always known, and 3 bits do get some wrong
    assert forced["rtn"].agreement == generated["rtn"].agreement
    assert forced["rtn"].exact_match == generated["rtn"].exact_match


def test_forcing_needs_the_full_precision_model(twins: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="full-precision model directory"):
        evaluate_many([("noisy", twins[1])], None, load_samples("demo:dev", 2), engine="forced")
