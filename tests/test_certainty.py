"""Intervals cover what they say, and verdicts are those of the tests that they name."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from models import certainty
from models.certainty import (
    LEAST,
    Bools,
    Floats,
    accuracy_interval,
    compare_answers,
    compare_texts,
    perplexity_interval,
    ratio_interval,
)


def texts(random: np.random.Generator, count: int) -> tuple[Floats, Floats, Floats]:
    """Nats of two models and tokens, of documents whose lengths span a factor of ten (5th to 95th percentile)."""
    tokens_D = np.maximum(2, random.lognormal(4.5, 0.7, count)).round()
    reference_D = tokens_D * random.normal(3.0, 0.4, count)
    apart_D = tokens_D * random.normal(0.004, 0.05, count) + random.normal(0, 0.3, count) * np.sqrt(tokens_D)
    return reference_D + apart_D, reference_D, tokens_D


@pytest.mark.parametrize("count", [30, 200])
def test_intervals_of_texts_cover_the_truth_as_often_as_they_say(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certainty, "_RESAMPLES", 1000)
    random = np.random.default_rng(1)
    model_D, reference_D, tokens_D = texts(random, 1_000_000)
    truths = (model_D.sum() / tokens_D.sum(), (model_D - reference_D).sum() / tokens_D.sum())
    trials, covered = 1000, np.zeros(2)
    for _ in range(trials):
        model_D, reference_D, tokens_D = texts(random, count)
        for at, sums_D in enumerate((model_D, model_D - reference_D)):
            low, high = ratio_interval(sums_D, tokens_D)
            covered[at] += low <= truths[at] <= high
    assert covered / trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("count", [100, 400])
def test_intervals_of_answers_cover_the_truth_as_often_as_they_say(count: int) -> None:
    random = np.random.default_rng(2)
    trials, covered = 2000, np.zeros(3)
    for _ in range(trials):
        right_Q, reference_Q = answers(random, count)
        found = compare_answers(right_Q, reference_Q, margin=0.01)
        low, high = accuracy_interval(right_Q)
        covered += (
            low <= 0.51 <= high,
            found.interval[0] <= -0.03 <= found.interval[1],
            found.inner[0] <= -0.03 <= found.inner[1],
        )
    assert covered / trials == pytest.approx(np.array([0.95, 0.95, 0.9]), abs=0.02)


def answers(random: np.random.Generator, count: int) -> tuple[Bools, Bools]:
    """6 % gained, 9 % lost, 45 % right in both."""
    drawn_Q = random.random(count)
    both_Q = drawn_Q < 0.45
    return both_Q | ((drawn_Q >= 0.45) & (drawn_Q < 0.51)), both_Q | (drawn_Q >= 0.91)


def test_no_difference_is_said_to_be_one_as_seldom_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that differ by just the margin are called equivalent in at most 5 %, equal ones unequal in at most 5 %."""
    monkeypatch.setattr(certainty, "_RESAMPLES", 1000)
    random = np.random.default_rng(3)
    trials, wrong = 400, np.zeros(2)
    for _ in range(trials):
        tokens_D = np.maximum(2, random.lognormal(4.0, 0.5, 60)).round()
        reference_D = 3 * tokens_D
        noise_D = random.normal(0, 0.01, 60) * tokens_D
        beyond = compare_texts(reference_D + noise_D + math.log(1.01) * tokens_D, reference_D, tokens_D, margin=0.01)
        none = compare_texts(reference_D + 10 * noise_D, reference_D, tokens_D, margin=0.01)
        wrong += (beyond.verdict == "equivalent", none.verdict in ("better", "worse"))
    assert (wrong / trials <= 0.05 + 0.02).all(), wrong / trials


@pytest.mark.parametrize(("gained", "lost"), [*product((0, 1, 3, 12), (0, 2, 9))])
def test_mcnemar_is_exact(gained: int, lost: int) -> None:
    right_Q = np.array([True] * gained + [False] * lost + [True] * 30 + [False] * 20)
    reference_Q = np.array([False] * gained + [True] * lost + [True] * 30 + [False] * 20)
    apart = gained + lost
    tail = sum(math.comb(apart, each) for each in range(min(gained, lost) + 1)) / 2**apart
    found = compare_answers(right_Q, reference_Q, margin=0.01)
    assert found.p == pytest.approx(min(1, 2 * tail))
    assert found.difference == pytest.approx((gained - lost) / len(right_Q))
    assert found.units == len(right_Q)
    if found.p is not None and found.p < 0.05:
        assert found.verdict == ("better" if gained > lost else "worse")


def test_wilsons_interval() -> None:
    low, high = accuracy_interval(np.array([True] * 27 + [False] * 13))
    z, share, count = 1.959964, 27 / 40, 40
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=1e-6)


def test_verdicts_on_texts() -> None:
    random = np.random.default_rng(4)
    tokens_D = random.integers(20, 400, 120).astype(float)
    reference_D = 3 * tokens_D + random.normal(0, 5, 120)
    noise_D = random.normal(0, 0.02, 120) * tokens_D

    def verdict(apart: float, margin: float = 0.01, noise: float = 1) -> str:
        found = compare_texts(reference_D + noise * noise_D + apart * tokens_D, reference_D, tokens_D, margin)
        assert found.interval[0] <= found.difference <= found.interval[1]
        assert found.interval[0] <= found.inner[0] <= found.inner[1] <= found.interval[1]
        assert (found.needed is None) == (found.verdict != "undecided")
        return found.verdict

    assert verdict(0.0) == "equivalent"
    assert verdict(0.05) == "worse"
    assert verdict(-0.05) == "better"
    assert verdict(0.002, noise=20) == "undecided"
    assert verdict(0.05, margin=0.2) == "equivalent"  # a difference that is there, and does not matter
    same = compare_texts(reference_D, reference_D, tokens_D, 0.01)
    assert (same.difference, same.interval, same.verdict) == (0, (0, 0), "equivalent")


def test_what_it_says_would_decide_does() -> None:
    random = np.random.default_rng(5)
    tokens_D = random.integers(20, 400, 60).astype(float)
    reference_D = 3 * tokens_D
    apart_D = random.normal(0.004, 0.06, 60) * tokens_D
    found = compare_texts(reference_D + apart_D, reference_D, tokens_D, 0.01)
    assert found.verdict == "undecided"
    assert found.needed is not None
    times = math.ceil(1.15 * found.needed / 60)  # the same difference and spread, on more documents
    more = [np.tile(each, times) for each in (reference_D + apart_D, reference_D, tokens_D)]
    assert compare_texts(*more, 0.01).verdict != "undecided"
    less = [np.tile(each, max(1, times // 3)) for each in (reference_D + apart_D, reference_D, tokens_D)]
    assert compare_texts(*less, 0.01).verdict == "undecided"


def test_few_documents_decide_nothing() -> None:
    few = np.arange(1, LEAST, dtype=float)
    assert compare_texts(few * 4, few, few, 0.01).verdict == "undecided"
    assert perplexity_interval(few, few) == (0, math.inf)
    assert compare_answers(few > 3, few > 3, 0.5).verdict == "undecided"
    assert ratio_interval(np.arange(50.0), np.ones(50)) == ratio_interval(np.arange(50.0), np.ones(50))
