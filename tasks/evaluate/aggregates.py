"""How rows become a score with its 95 % interval: one function for each `tasks.core.metrics.metric.Aggregate`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.intervals import Rate, wilson
from tasks.core.metrics.metric import Aggregate, Metric
from tasks.evaluate.bootstrap import Counts, Estimate, bootstrap_categories, bootstrap_mean

Observations = Sequence[Any]


def aggregate(metric: Metric, observations: Observations, out_of_scope: str) -> Rate | Estimate | None:
    """The metric's score over rows that it applies to; None where no row decides it."""
    return AGGREGATES[metric.aggregate](metric, observations, out_of_scope)


def _rate(metric: Metric, observations: Observations, out_of_scope: str) -> Rate | None:
    values = _row_values(metric, observations, out_of_scope)
    return wilson(sum(values), len(values)) if values else None


def _pooled_rate(metric: Metric, observations: Observations, out_of_scope: str) -> Rate | None:
    values = _row_values(metric, observations, out_of_scope)
    hits, total = sum(row[0] for row in values), sum(row[1] for row in values)
    return wilson(hits, total) if total else None


def _mean(metric: Metric, observations: Observations, out_of_scope: str) -> Estimate | None:
    values = _row_values(metric, observations, out_of_scope)
    return bootstrap_mean(values) if values else None


def _row_values(metric: Metric, observations: Observations, out_of_scope: str) -> list[Any]:
    values = (metric.row_value(observation, out_of_scope) for observation in observations)
    return [value for value in values if value is not None]


def _micro_f1(metric: Metric, counts: Observations, out_of_scope: str) -> Estimate | None:
    """F1 of counts (true positives, predicted, expected) summed over rows: 2 TP / (predicted + expected)."""
    if not sum(expected for _, _, expected in counts):
        return None
    return bootstrap_categories([(hits, predicted, expected) for hits, predicted, expected in counts], _counts_f1)


def _counts_f1(categories: list[tuple[int, int, int]], counts: Counts) -> NDArray[np.float64]:
    hits, predicted, expected = (counts @ column for column in np.array(categories).T)
    return np.asarray(2 * hits / np.maximum(predicted + expected, 1))


def _macro_f1(metric: Metric, pairs: Observations, out_of_scope: str) -> Estimate | None:
    """Mean F1 of the classes that are expected in any row, from pairs (expected, predicted)."""
    return bootstrap_categories([(expected, predicted) for expected, predicted in pairs], _pairs_f1) if pairs else None


def _pairs_f1(pairs: list[tuple[str, str]], counts: Counts) -> NDArray[np.float64]:
    """A class that is never expected counts by what it takes from the others.

    A class that a resample drew neither as expected nor as predicted counts as 0 there, as in scikit-learn.
    """
    labels = sorted({expected for expected, _ in pairs})
    f1 = np.zeros((len(counts), len(labels)))
    for column, label in enumerate(labels):
        hits = counts[:, [pair == (label, label) for pair in pairs]].sum(1)
        total = sum(counts[:, [pair[side] == label for pair in pairs]].sum(1) for side in (0, 1))
        f1[:, column] = 2 * hits / np.maximum(total, 1)
    return np.asarray(f1.mean(1))


AGGREGATES: dict[Aggregate, Callable[[Metric, Observations, str], Rate | Estimate | None]] = {
    "rate": _rate,
    "pooled rate": _pooled_rate,
    "mean": _mean,
    "micro F1": _micro_f1,
    "macro F1": _macro_f1,
}
