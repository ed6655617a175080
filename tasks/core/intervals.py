"""Confidence intervals and paired tests: Wilson's interval, McNemar's exact test, paired differences.

Plain values in, plain values out; no numpy, because flows use it too. Two models a and b on the same rows form a 2 x 2
table, whose cells are named by a's outcome, then b's: `right_right`, `wrong_right` (only b is right), `right_wrong`
(only a is), `wrong_wrong`.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

Z95 = NormalDist().inv_cdf(0.975)


class Rate(NamedTuple):
    """`hits` of `of`, with its 95 % Wilson interval from `low` to `high`."""

    value: float
    low: float
    high: float
    hits: int
    of: int


class Difference(NamedTuple):
    """A mean of differences b - a over the same rows, with its interval from `low` to `high`, and a test's `p`."""

    value: float
    low: float
    high: float
    p: float


def wilson(hits: int, of: int, z: float = Z95) -> Rate:
    """The rate `hits`/`of` with its score interval (Wilson 1927); `of` must be above 0."""
    p = hits / of
    center = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return Rate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), hits, of)


def mcnemar(wrong_right: int, right_wrong: int) -> float:
    """Two-sided exact p of McNemar's test (1947) that two models answer equally well, from their discordant rows.

    Under the null either side of a discordant row is as likely: twice the binomial tail, at most 1.
    """
    discordant, smaller = wrong_right + right_wrong, min(wrong_right, right_wrong)
    if not discordant:
        return 1.0
    choose, total = 1, 0
    for successes in range(smaller + 1):
        total += choose
        choose = choose * (discordant - successes) // (successes + 1)
    return min(1.0, total / (1 << (discordant - 1)))


def paired_rates(right_right: int, wrong_right: int, right_wrong: int, wrong_wrong: int, z: float = Z95) -> Difference:
    """Rate of b less rate of a on the same rows, with Newcombe's interval for pairs (1998, method 10).

    Wilson's limits of both rates, put together with their correlation, so that no discordant row still leaves an
    interval.
    """
    rows = right_right + wrong_right + right_wrong + wrong_wrong
    a, b = wilson(right_right + right_wrong, rows, z), wilson(right_right + wrong_right, rows, z)
    difference = (wrong_right - right_wrong) / rows
    phi = _phi(right_right, wrong_right, right_wrong, wrong_wrong)

    def limit(left: float, right: float) -> float:
        return math.sqrt(max(0.0, left * left - 2 * phi * left * right + right * right))

    low = difference - limit(b.value - b.low, a.high - a.value)
    high = difference + limit(b.high - b.value, a.value - a.low)
    return Difference(difference, max(-1.0, low), min(1.0, high), mcnemar(wrong_right, right_wrong))


def _phi(right_right: int, wrong_right: int, right_wrong: int, wrong_wrong: int) -> float:
    """Correlation of the models' correctness, continuity-corrected when positive; 0 where a margin is empty."""
    a_right, b_right = right_right + right_wrong, right_right + wrong_right
    a_wrong, b_wrong = wrong_wrong + wrong_right, wrong_wrong + right_wrong
    margins = b_right * b_wrong * a_right * a_wrong
    if not margins:
        return 0.0
    product = right_right * wrong_wrong - wrong_right * right_wrong
    rows = right_right + wrong_right + right_wrong + wrong_wrong
    return max(product - rows / 2, 0.0) / math.sqrt(margins) if product > 0 else product / math.sqrt(margins)


def paired_means(differences: list[float], z: float = Z95) -> Difference:
    """The mean of row-wise differences with its normal interval and a two-sided z test; rows must be above 0."""
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / max(1, count - 1)
    error = math.sqrt(variance / count)
    p = 2 * (1 - NormalDist().cdf(abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, mean - z * error, mean + z * error, p)
