"""scores.json: every metric over a run's rows, the table of intents, and their confusion matrix."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tasks.core.intervals import Rate
from tasks.core.metrics import METRICS
from tasks.evaluate.aggregates import aggregate


def score(rows: Sequence[dict[str, Any]], out_of_scope: str) -> dict[str, Any]:
    """All scores of a run: `rates` (each a Rate as a dict), `means` (each an Estimate), `intents` and `confusion`.

    `rows` are those of `tasks.core.metrics.observe`. A metric that applies to no row is left out. Raises ValueError
    without rows.
    """
    if not rows:
        raise ValueError("no rows to score")
    rates: dict[str, Any] = {}
    means: dict[str, Any] = {}
    for metric in METRICS.values():
        observations = [row[metric.field] for row in rows if row.get(metric.field) is not None]
        result = aggregate(metric, observations, out_of_scope)
        if result is not None:
            (rates if isinstance(result, Rate) else means)[metric.name] = result._asdict()
    return {
        "rows": len(rows),
        "rates": rates,
        "means": means,
        "intents": by_intent(rows),
        "confusion": confusion(row["intent"] for row in rows if row["intent"] is not None),
    }


def values(scores: dict[str, Any]) -> dict[str, float]:
    """The scores of scores.json by name, without their intervals."""
    return {name: estimate["value"] for name, estimate in {**scores["rates"], **scores["means"]}.items()}


def by_intent(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For every intent that is expected: rows, precision, recall and F1 of the intent, share of rows wholly right."""
    rows = [row for row in rows if row["intent"] is not None]
    predictions = Counter(predicted for _, predicted in (row["intent"] for row in rows))
    table = {}
    for name in sorted({row["intent"][0] for row in rows}):
        expected = [row for row in rows if row["intent"][0] == name]
        hits = sum(row["intent"][1] == name for row in expected)
        table[name] = {
            "rows": len(expected),
            "precision": hits / predictions[name] if predictions[name] else 0.0,
            "recall": hits / len(expected),
            "f1": 2 * hits / (len(expected) + predictions[name]),
            "exact_match": sum(row["exact_match"] for row in expected) / len(expected),
        }
    return table


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Rows by expected and predicted intent, {expected: {predicted: rows}}, names sorted."""
    counts: dict[str, Counter[str]] = {}
    for expected, predicted in pairs:
        counts.setdefault(expected, Counter())[predicted] += 1
    return {expected: dict(sorted(row.items())) for expected, row in sorted(counts.items())}
