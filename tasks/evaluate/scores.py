"""The mathematics of scoring a run: rates with Wilson's interval, F1s and means with a bootstrap's, the confusion."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.intervals import Rate, wilson
from tasks.evaluate.answer_scores import Judged
from tasks.evaluate.bootstrap import Counts, Estimate, over_kinds, over_values

Pair = tuple[str, str]


def score(judged: Sequence[Judged], out_of_scope: str) -> dict[str, Any]:
    """All scores of a run: `rates` (each a Rate as a dict), `means` (each an Estimate), `intents` and `confusion`.

    A score that no row speaks of is left out. Raises ValueError without rows.
    """
    if not judged:
        raise ValueError("no rows to score")
    intents = [row.intent for row in judged if row.intent is not None]
    rates = {"exact_match": _rate(row.exact_match for row in judged)}
    rates["json_valid"] = _rate(row.json_valid for row in judged)
    rates["json_valid_after_repair"] = _rate(row.json_valid_after_repair for row in judged)
    rates["schema_valid"] = _rate(row.schema_valid for row in judged)
    rates["intent_accuracy"] = _rate(expected == given for expected, given in intents)
    rates["out_of_scope_recall"] = _rate(given == out_of_scope for one, given in intents if one == out_of_scope)
    rates["out_of_scope_precision"] = _rate(one == out_of_scope for one, given in intents if given == out_of_scope)
    entities = [row.entities for row in judged if row.entities is not None]
    hits, given, expected = (sum(row[i] for row in entities) for i in range(3))
    rates["entity_precision"] = wilson(hits, given) if given else None
    rates["entity_recall"] = wilson(hits, expected) if expected else None
    means: dict[str, Estimate] = {}
    if expected:
        means["entity_f1"] = over_kinds(entities, _entity_f1)
    if intents:
        means["intent_macro_f1"] = over_kinds(intents, _macro_f1)
    for name, field in (("token_f1", "f1"), ("rouge_l", "rouge_l"), ("metric", "metric")):
        values = [value for row in judged if (value := getattr(row, field)) is not None]
        if values:
            means[name] = over_values(values)
    return {
        "rows": len(judged),
        "rates": {name: rate._asdict() for name, rate in rates.items() if rate is not None},
        "means": {name: mean._asdict() for name, mean in means.items()},
        "intents": by_intent(judged),
        "confusion": confusion(intents),
    }


def by_intent(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """For every intent that is expected: rows, precision, recall and F1 of the intent, share of rows wholly right."""
    intents = [row.intent for row in judged if row.intent is not None]
    given = Counter(said for _, said in intents)
    table = {}
    for name in sorted({expected for expected, _ in intents}):
        own = [row for row in judged if row.intent is not None and row.intent[0] == name]
        hits = sum(row.intent == (name, name) for row in own)
        table[name] = {
            "rows": len(own),
            "precision": hits / given[name] if given[name] else 0.0,
            "recall": hits / len(own),
            "f1": 2 * hits / (len(own) + given[name]),
            "exact_match": sum(row.exact_match for row in own) / len(own),
        }
    return table


def confusion(intents: Iterable[Pair]) -> dict[str, dict[str, int]]:
    """{expected: {given: rows}}, names sorted."""
    counts: dict[str, Counter[str]] = {}
    for expected, given in intents:
        counts.setdefault(expected, Counter())[given] += 1
    return {expected: dict(sorted(row.items())) for expected, row in sorted(counts.items())}


def _macro_f1(pairs: list[Pair], counts: Counts) -> NDArray[np.float64]:
    """The mean F1 of the intents that are expected anywhere; an intent never expected counts by what it takes away.

    An intent that a resample drew neither as expected nor as given counts as 0 there, as in scikit-learn.
    """
    labels = sorted({expected for expected, _ in pairs})
    f1 = np.zeros((len(counts), len(labels)))
    for place, label in enumerate(labels):
        hits = counts[:, [one == (label, label) for one in pairs]].sum(1)
        both = sum(counts[:, [one[side] == label for one in pairs]].sum(1) for side in (0, 1))
        f1[:, place] = 2 * hits / np.maximum(both, 1)
    return np.asarray(f1.mean(1))


def _entity_f1(rows: list[tuple[int, int, int]], counts: Counts) -> NDArray[np.float64]:
    """F1 over all entity values (micro), from rows of (hits, given, expected)."""
    hits, given, expected = counts @ np.array(rows).T[0], counts @ np.array(rows).T[1], counts @ np.array(rows).T[2]
    return np.asarray(2 * hits / np.maximum(given + expected, 1))


def _rate(checks: Iterable[bool | None]) -> Rate | None:
    known = [check for check in checks if check is not None]
    return wilson(sum(known), len(known)) if known else None
