"""How sure a figure is: intervals over documents or questions, paired comparisons, and what they decide.

Documents and questions are what was drawn at random, not tokens: those of one text depend on each other. A comparison
is paired, since two models differ by far less than two texts do. Equivalence is shown by two one-sided tests
(Schuirmann 1987): a difference that nobody has found is not a difference that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Interval = tuple[float, float]
Verdict = Literal["equivalent", "better", "worse", "undecided"]

LEVEL = 0.95
LEAST = 10  # documents or questions; of fewer nothing is said
_RESAMPLES = 4000
_AT_A_TIME = 1 << 20  # numbers drawn


@dataclass(frozen=True)
class Compared:
    """`difference` of a model from its reference: of perplexity as a share of the reference's (0.01 is 1 % more), of
    accuracy in points of 1."""

    difference: float
    interval: Interval  # 95 %
    inner: Interval  # 90 %: within the margin where both one-sided tests reject at 5 %
    p: float | None  # of no difference: exact McNemar; None for text
    verdict: Verdict
    units: int  # documents or questions
    needed: int | None  # of them, if nothing else changes, to decide; None: decided, or no number would


def ratio_interval(sums_D: Floats, sizes_D: Floats, level: float = LEVEL, seed: int = 0) -> Interval:
    """Of Σ sums ÷ Σ sizes over all documents that could have been drawn, by the studentized bootstrap (Efron and
    Tibshirani 1993, 12.5), whose coverage stays near the level for few and unlike documents. Infinite below LEAST."""
    return _ratio_intervals(sums_D, sizes_D, [level], seed)[0]


def _ratio_intervals(sums_D: Floats, sizes_D: Floats, levels: Sequence[float], seed: int = 0) -> list[Interval]:
    if len(sums_D) < LEAST:
        return [(-math.inf, math.inf) for _ in levels]
    found, error = _ratio(sums_D, sizes_D)
    random = np.random.default_rng(seed)
    students: list[Floats] = []
    chunk = max(1, _AT_A_TIME // len(sums_D))
    for at in range(0, _RESAMPLES, chunk):
        drawn_RD = random.integers(len(sums_D), size=(min(chunk, _RESAMPLES - at), len(sums_D)))
        each_R, errors_R = _ratio(sums_D[drawn_RD], sizes_D[drawn_RD])
        with np.errstate(divide="ignore", invalid="ignore"):
            students.append((each_R - found) / errors_R)
    students_R = np.concatenate(students)
    students_R = students_R[np.isfinite(students_R)]
    if error == 0 or not len(students_R):  # all documents say the same
        return [(float(found), float(found)) for _ in levels]
    ends = [np.quantile(students_R, [(1 - level) / 2, (1 + level) / 2]) for level in levels]
    return [(float(found - high * error), float(found - low * error)) for low, high in ends]


def _ratio(sums: Floats, sizes: Floats) -> tuple[Any, Any]:
    """Over the last axis: the ratio, and its standard error by the jackknife."""
    count, size = sums.shape[-1], sizes.sum(-1)
    ratio = sums.sum(-1) / size
    without = (sums.sum(-1)[..., None] - sums) / (size[..., None] - sizes)  # each of them in turn
    return ratio, np.sqrt((count - 1) / count * ((without - without.mean(-1)[..., None]) ** 2).sum(-1))


def perplexity_interval(nats_D: Floats, tokens_D: Floats) -> Interval:
    low, high = ratio_interval(nats_D, tokens_D)
    return math.exp(low), math.exp(high)


def accuracy_interval(right_Q: Bools) -> Interval:
    """Wilson's (1927)."""
    from scipy.stats import binomtest

    found = binomtest(int(right_Q.sum()), len(right_Q)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def compare_texts(nats_D: Floats, reference_D: Floats, tokens_D: Floats, margin: float) -> Compared:
    """Perplexities on the same documents. `tokens_D`: the reference's, by which both are divided, so that models with
    other tokenizers are compared on the text. `margin`: a share of the reference's perplexity."""
    apart_D = nats_D - reference_D
    ratio, error = _ratio(apart_D, tokens_D)
    interval, inner = _ratio_intervals(apart_D, tokens_D, [LEVEL, 2 * LEVEL - 1])
    bounds = (math.log1p(-margin), math.log1p(margin))
    count = len(nats_D)
    verdict = _verdict(interval, inner, bounds, worse=1)
    needed = _needed(float(ratio), float(error), count, bounds, verdict)
    shown, shown_inner = ((math.expm1(low), math.expm1(high)) for low, high in (interval, inner))
    return Compared(math.expm1(float(ratio)), shown, shown_inner, None, verdict, count, needed)


def compare_answers(right_Q: Bools, reference_Q: Bools, margin: float) -> Compared:
    """Accuracies on the same questions: exact McNemar (1947) whether they differ, and an interval of the paired
    difference by Agresti and Min (2005). `margin`: in points of 1."""
    from scipy.stats import binomtest, norm

    count = len(right_Q)
    gained, lost = int((right_Q & ~reference_Q).sum()), int((~right_Q & reference_Q).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    difference = (gained - lost) / (count + 2)
    error = math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)

    def interval(level: float) -> Interval:
        if count < LEAST:
            return -1.0, 1.0
        reach = float(norm.ppf((1 + level) / 2)) * error
        return max(-1.0, difference - reach), min(1.0, difference + reach)

    outer, inner = interval(LEVEL), interval(2 * LEVEL - 1)
    verdict = _verdict(outer, inner, (-margin, margin), worse=-1, differ=p < 1 - LEVEL)
    needed = _needed(difference, error, count, (-margin, margin), verdict)
    return Compared((gained - lost) / max(1, count), outer, inner, p, verdict, count, needed)


def _verdict(
    interval: Interval,
    inner: Interval,
    bounds: Interval,
    worse: int,
    differ: bool | None = None,
) -> Verdict:
    if bounds[0] < inner[0] and inner[1] < bounds[1]:
        return "equivalent"
    differ = interval[0] > 0 or interval[1] < 0 if differ is None else differ
    if not differ or not np.isfinite(interval).all():
        return "undecided"
    return "worse" if (interval[0] + interval[1]) * worse > 0 else "better"


def _needed(difference: float, error: float, count: int, bounds: Interval, verdict: Verdict) -> int | None:
    """The error shrinks with the root of the number: until the 90 % interval lies within the margin, or the 95 % one
    leaves zero out, whichever comes first."""
    if verdict != "undecided" or not math.isfinite(error):
        return None
    room = min(difference - bounds[0], bounds[1] - difference)
    ways = [1.645 * error / room] if room > 0 else []
    ways += [1.96 * error / abs(difference)] if difference else []
    return max(LEAST, math.ceil(count * min(ways) ** 2)) if ways else None
