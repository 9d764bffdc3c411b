"""The comparison of methods: pooling over seeds, tests between methods, table and plot."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qig_serve.evaluate import Answer, EvaluationResult
from qig_serve.evaluation.comparison import (
    Run,
    answers_table,
    distance_table,
    pairwise,
    pairwise_table,
    plot,
    summarize,
    to_json,
    types_table,
)
from qig_serve.evaluation.divergence import Divergence
from qig_serve.evaluation.statistics import paired


def _result(right: int, n: int = 40, kl: float | None = None) -> EvaluationResult:
    """The first `right` of n questions answered rightly."""
    answers = tuple(
        Answer(str(i), "odd" if i % 2 else "even", "yes", "yes" if i < right else "no")
        for i in range(n)
    )
    divergence = None
    if kl is not None:
        divergence = Divergence(
            n, 2 * n, kl, 0.1, kl, 2 * kl, 3 * kl, 0.9, 1.1, 1.0, {"odd": kl}, kl / 4, None
        )
    return EvaluationResult("m", "some/dir", "transformers", answers, "h", divergence=divergence)


FULL = {0: _result(40), 1: _result(36)}
RUNS = [
    Run("w3a16", "rtn", 0, _result(20, kl=0.4), 1.0, 1 << 30),
    Run("w3a16", "rtn", 1, _result(24, kl=0.2), 3.0, 2 << 30),
    Run("w3a16", "qig", 1, _result(36, kl=0.02), 5.0, 1 << 30),
    Run("w3a16", "qig", 0, _result(34, kl=0.04), 5.0, 1 << 30),
    Run("w2a16", "rtn", 0, _result(0), 1.0, 0),
]


def test_summaries_pool_over_seeds() -> None:
    rtn, qig, stress = summarize(RUNS, FULL)
    assert (rtn.method, rtn.seeds, qig.seeds, stress.scheme) == ("rtn", 2, 2, "w2a16")
    assert rtn.exact_match == pytest.approx(44 / 80) and rtn.kl_mean == pytest.approx(0.3)
    assert rtn.kl_se == pytest.approx(0.1)  # between seeds, not within
    assert rtn.against_full == paired(
        [True] * 40 + [i < 36 for i in range(40)],
        [i < 20 for i in range(40)] + [i < 24 for i in range(40)],
    )
    assert (rtn.seconds, rtn.peak_bytes) == (2.0, 2 << 30)
    assert rtn.perplexity_ratio == pytest.approx(1.1)
    assert stress.kl_mean is None and stress.exact_match == 0


def test_methods_are_compared_on_the_same_seeds() -> None:
    """Runs come in any order: pairs must be of one seed."""
    tests = pairwise(RUNS, "w3a16")
    found = tests["rtn", "qig"]
    assert (found.right_to_wrong, found.wrong_to_right, found.n) == (0, 26, 80)
    assert tests["qig", "rtn"].difference == -found.difference and found.p_value < 1e-6


def test_json_table_and_plot(tmp_path: Path) -> None:
    record = to_json(RUNS, FULL)
    json.dumps(record, allow_nan=False)
    assert len(record["runs"]) == 5 and len(record["pairwise"]) == 2
    # The results know no method, as those of ordinary models; they were in a folder.
    assert record["runs"][3]["scheme"] == "w3a16" and record["runs"][3]["method"] == "qig"
    assert record["full_precision"]["1"]["model"] == "dir"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(answers_table(RUNS, FULL), distance_table(RUNS, FULL))
    console.print(types_table(RUNS, FULL, "w3a16"), pairwise_table(RUNS, "w3a16"))
    text = console.export_text()
    assert "95.0%" in text and "55.0%" in text and "+32.5" in text and "w2a16" in text
    assert text.count("qig") >= 4 and "…" not in text  # whole at 80 columns
    for name in ("p.png", "p.svg"):
        plot(RUNS, FULL, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_unequal_seeds_are_not_paired() -> None:
    extra = dataclasses.replace(RUNS[0], seed=7)
    with pytest.raises(ValueError, match="equally long"):
        pairwise([*RUNS, extra], "w3a16")
