"""Intervals and paired tests against scipy, published examples, and their own promise: 95 of 100 hold the truth."""

import random

import numpy as np
import pytest
from scipy import stats

from tasks.core.intervals import mcnemar, paired_means, paired_rates, wilson
from tasks.evaluate.bootstrap import bootstrap_categories, bootstrap_mean


@pytest.mark.parametrize(("count", "of"), [(0, 10), (10, 10), (1, 3), (37, 400), (399, 400), (1, 1)])
def test_wilson_is_scipys(count: int, of: int) -> None:
    rate, expected = wilson(count, of), stats.binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert (rate.value, rate.low, rate.high) == pytest.approx((count / of, expected.low, expected.high), abs=1e-6)


def test_wilson_by_hand() -> None:
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.71674, half width 1.96 sqrt(0.016 + 0.0096037) / 1.38415 = 0.22657
    assert wilson(8, 10)[1:3] == pytest.approx((0.49016, 0.94332), abs=2e-5)


@pytest.mark.parametrize(
    ("wrong_right", "right_wrong"), [(0, 0), (1, 0), (3, 3), (1, 7), (16, 30), (0, 60), (200, 260)]
)
def test_mcnemar_is_the_exact_binomial_test(wrong_right: int, right_wrong: int) -> None:
    expected = stats.binomtest(wrong_right, wrong_right + right_wrong).pvalue if wrong_right + right_wrong else 1.0
    assert mcnemar(wrong_right, right_wrong) == pytest.approx(expected, rel=1e-9)


def test_newcombes_interval_is_the_published_one() -> None:
    # Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al. 2009; Fagerland et al. 2014
    # give -0.507 to -0.026 for Newcombe's interval): both 1, only before 7, only after 1, neither 12.
    found = paired_rates(right_right=1, wrong_right=1, right_wrong=7, wrong_wrong=12)
    assert (found.value, found.low, found.high) == pytest.approx((-0.286, -0.507, -0.026), abs=5e-4)
    mirrored = paired_rates(right_right=1, wrong_right=7, right_wrong=1, wrong_wrong=12)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert paired_rates(400, 0, 0, 40).low < 0 < paired_rates(400, 0, 0, 40).high  # no discordant row, no certainty


def test_paired_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    chance, held = random.Random(0), 0
    for _ in range(600):  # 90 % both right, 3 % only b, 5 % only a, 2 % neither: b is 2 points worse
        drawn = chance.choices(range(4), [0.90, 0.03, 0.05, 0.02], k=300)
        found = paired_rates(*(drawn.count(kind) for kind in range(4)))
        held += found.low <= -0.02 <= found.high
    assert 0.93 <= held / 600 <= 0.985


def test_paired_means_are_a_normal_interval() -> None:
    numbers = np.random.default_rng(0).normal(0.1, 1, 500)
    found = paired_means(numbers.tolist())
    assert found.value == pytest.approx(numbers.mean())
    half = 1.959964 * numbers.std(ddof=1) / np.sqrt(500)
    assert (found.low, found.high) == pytest.approx((numbers.mean() - half, numbers.mean() + half), rel=1e-5)
    assert found.p == pytest.approx(stats.ttest_1samp(numbers, 0).pvalue, abs=2e-3)
    assert paired_means([0.0, 0.0]).p == 1.0 and paired_means([0.5, 0.5]).p == 0.0


def test_the_bootstrap_is_scipys_and_repeats_itself() -> None:
    numbers = np.random.default_rng(1).beta(5, 2, 200).tolist()
    found = bootstrap_mean(numbers)
    expected = stats.bootstrap((numbers,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)
    assert found == bootstrap_mean(numbers)
    coins = [True] * 150 + [False] * 50
    share = bootstrap_categories(coins, lambda categories, counts: counts[:, categories.index(True)] / counts.sum(1))
    assert share.value == 0.75 and (share.low, share.high) == pytest.approx((0.69, 0.81), abs=0.012)
