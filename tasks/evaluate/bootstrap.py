"""Percentile bootstrap (Efron 1979) for scores that are no rates: resample the rows, score again, take the middle 95 %.

Seeded, so that the same answers give the same interval.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 0
Counts = NDArray[np.int64]
Category = TypeVar("Category", bound=Hashable)


class Estimate(NamedTuple):
    """A score with its 95 % bootstrap interval from `low` to `high`."""

    value: float
    low: float
    high: float


def bootstrap_categories(
    rows: Sequence[Category], statistic: Callable[[list[Category], Counts], NDArray[np.float64]]
) -> Estimate:
    """For rows that fall into few categories: resamples their counts, which is the same and much faster.

    `statistic(categories, counts)` scores every resample; counts are [resamples, categories].
    """
    frequencies = Counter(rows)
    categories = sorted(frequencies, key=repr)
    counts = np.array([frequencies[category] for category in categories])
    resampled = np.random.default_rng(SEED).multinomial(len(rows), counts / len(rows), size=RESAMPLES)
    value = float(statistic(categories, counts[None])[0])
    return _estimate(value, statistic(categories, resampled))


def bootstrap_mean(values: Sequence[float]) -> Estimate:
    """The mean of a number a row."""
    array, generator = np.asarray(values, np.float64), np.random.default_rng(SEED)
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    return _estimate(float(array.mean()), np.array(means))


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, min(value, float(low)), max(value, float(high)))
