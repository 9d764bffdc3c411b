"""Exact match and paired statistics against values known from elsewhere."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from qig_serve.evaluation.statistics import (
    clopper_pearson,
    clustered_mean,
    exact_match,
    is_repeating,
    paired,
)


@pytest.mark.parametrize(
    ("output", "answer", "same"),
    [
        ("Yes", "yes", True),
        ("  a  red\n square ", "a red square", True),
        ("cafe\u0301", "café", True),
        ("yes.", "yes", False),
        ("3", "three", False),
        ("yes it is", "yes", False),
        ("", "yes", False),
        ("Two. No, one.\n</think>\n\nOne", "one", True),
        ("<think>one", "one", False),
    ],
    ids=[
        *("case", "space", "composed", "punctuation", "numeral", "longer", "empty", "thoughts"),
        "thoughts-cut",
    ],
)
def test_exact_match_forgives_case_and_space_only(output: str, answer: str, same: bool) -> None:
    assert exact_match(output, answer) is same


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("no no no no", True),
        ("the cat the cat the cat the cat", True),
        ("well the cat sat the cat sat the cat sat the cat sat on", True),
        ("no no no", False),
        ("a red square at row 1 column 1, a red circle at row 1 column 2", False),
        ("aaaaaaaaaaaaaaaaaaaaaaaa", True),
        ("--------------------------------", False),
        ("", False),
    ],
    ids=["word", "phrase", "with-a-beginning", "thrice", "parallel", "letter", "rule", "empty"],
)
def test_repetition(text: str, repeats: bool) -> None:
    assert is_repeating(text) is repeats


@pytest.mark.parametrize(("worse", "better"), [(10, 3), (0, 6), (40, 41), (1, 0), (300, 220)])
def test_mcnemar_equals_the_exact_binomial_test(worse: int, better: int) -> None:
    n = 1000
    first = [True] * worse + [False] * better + [True] * (n - worse - better)
    second = [False] * worse + [True] * better + [True] * (n - worse - better)
    found = paired(first, second)
    expected = stats.binomtest(better, worse + better, 0.5)
    low, high = expected.proportion_ci(0.95, "exact")
    assert (found.right_to_wrong, found.wrong_to_right) == (worse, better)
    assert found.difference == pytest.approx((better - worse) / n)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    scale = (worse + better) / n
    wanted = ((2 * low - 1) * scale, (2 * high - 1) * scale)
    assert found.interval == pytest.approx(wanted, abs=1e-9)
    assert (found.interval[0] <= 0 <= found.interval[1]) == (found.p_value >= 0.05)


def test_no_discordant_pair_is_no_evidence_but_an_interval() -> None:
    found = paired([True, False] * 50, [True, False] * 50)
    assert found.p_value == 1 and found.difference == 0
    assert found.interval[1] == pytest.approx(1 - 0.025 ** (1 / 100))


def test_paired_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="equally long"):
        paired([True], [True, False])


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (700, 2000), (1, 2000)])
def test_clopper_pearson(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert clopper_pearson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_standard_error_counts_answers_and_not_tokens() -> None:
    """Ten tokens with one value are one observation: the error is that of the answers."""
    rng = random.Random(0)
    values = [rng.gauss(1, 1) for _ in range(200)]
    mean, error = clustered_mean([10 * v for v in values], [10] * 200)
    assert mean == pytest.approx(sum(values) / 200)
    assert error == pytest.approx(stats.sem(values), rel=1e-6)
    assert clustered_mean([1.0], [3]) == (pytest.approx(1 / 3), None)
    assert math.isfinite(clustered_mean([1.0, 2.0], [3, 1])[1] or math.nan)
