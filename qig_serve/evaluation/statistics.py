"""Exact match, repeated text, and paired statistics. Plain Python."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def normalize(text: str) -> str:
    """The form in which answers are compared.

    Unicode NFC, case folded, surrounding white space removed, every inner run of white space
    one space. Thoughts up to `</think>` are no part of an answer. Nothing else is forgiven:
    punctuation, articles and number words count.
    """
    answer = text.rpartition("</think>")[2]
    return " ".join(unicodedata.normalize("NFC", answer).casefold().split())


def exact_match(output: str, answer: str) -> bool:
    """Whether the whole output is the whole answer, in the form of `normalize`."""
    return normalize(output) == normalize(answer)


def is_repeating(text: str) -> bool:
    """Whether some run of one to eight words comes four times in a row, or one character (not a
    digit, a space or a dash) 20 times."""
    words = text.split()
    for size in range(1, 9):
        same = 0  # consecutive words that equal the word one period earlier
        for i in range(size, len(words)):
            same = same + 1 if words[i] == words[i - size] else 0
            if same >= 3 * size:
                return True
    run = 1
    for a, b in itertools.pairwise(text):
        run = run + 1 if a == b and not (a.isdigit() or a.isspace() or a in "-_=") else 1
        if run >= 20:
            return True
    return False


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p)."""
    if k >= n or p <= 0:
        return 1.0
    if k < 0 or p >= 1:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    top = math.lgamma(n + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(
                top - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
            )
            for i in range(k + 1)
        ),
    )


def _root(f: Callable[[float], float]) -> float:
    """Root in (0, 1) of a decreasing function, by bisection to 2^-50."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    """Exact (central) 95% interval for a binomial proportion k / n."""
    if n == 0:
        return 0.0, 1.0
    half = (1 - 0.95) / 2
    low = 0.0 if k == 0 else _root(lambda p: half - (1 - _binomial_tail(k - 1, n, p)))
    high = 1.0 if k == n else _root(lambda p: _binomial_tail(k, n, p) - half)
    return low, high


@dataclass(frozen=True)
class Paired:
    """Two systems on the same questions; figures in fractions, not percent."""

    n: int
    right_to_wrong: int
    wrong_to_right: int
    difference: float
    """Exact match of the second less that of the first."""
    interval: tuple[float, float]
    """95% interval of the difference."""
    p_value: float
    """Two-sided exact McNemar."""


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Exact McNemar test of `second` against `first`, question by question."""
    n = len(first)
    if n != len(second) or n == 0:
        raise ValueError(f"paired needs two equally long, non-empty lists, got {n}, {len(second)}")
    worse = sum(a and not b for a, b in zip(first, second, strict=True))
    better = sum(b and not a for a, b in zip(first, second, strict=True))
    return mcnemar(n, worse, better)


def mcnemar(n: int, worse: int, better: int) -> Paired:
    """Exact McNemar test on n questions of which some turned wrong and some turned right.

    Given the discordant pairs, the number that turned right is binomial(1/2) under the null
    hypothesis (McNemar 1947). The interval is Clopper and Pearson's for the share that turned
    right, times the share of discordant pairs: it leaves out 0 exactly when p < 0.05. With no
    discordant pair there is nothing to condition on, and the interval is that of the number of
    discordant pairs itself (0 of n).
    """
    discordant = worse + better
    if discordant == 0:
        high = clopper_pearson(0, n)[1]
        return Paired(n, 0, 0, 0.0, (-high, high), 1.0)
    p_value = min(1.0, 2 * _binomial_tail(min(worse, better), discordant, 0.5))
    low, high = clopper_pearson(better, discordant)
    scale = discordant / n
    return Paired(
        n,
        worse,
        better,
        (better - worse) / n,
        ((2 * low - 1) * scale, (2 * high - 1) * scale),
        p_value,
    )


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean over tokens and its standard error, where tokens of one answer hang together.

    `sums` and `counts` are a sample's; the error is that of a ratio estimator with samples as
    clusters (Cochran, Sampling Techniques, 6.4). None for a single sample.
    """
    total, m = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if m < 2:
        return mean, None
    squares = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * m / (m - 1)) / total
