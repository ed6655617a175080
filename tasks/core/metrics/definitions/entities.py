"""Metrics of the `entities` of JSON answers: F1, precision and recall over all `key=value` pairs of all rows."""

from collections import Counter
from typing import Any

from tasks.core.metrics.json_values import canonical_json
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility


def entity_counts(row: AnsweredRow) -> tuple[int, int, int] | None:
    """The row's entities (true positives, predicted, expected); None where no entities are expected."""
    if row.expected_object is None or "entities" not in row.expected_object:
        return None
    expected, predicted = entity_pairs(row.expected_object), entity_pairs(row.answer_object or {})
    return (expected & predicted).total(), predicted.total(), expected.total()


def entity_pairs(value: dict[str, Any]) -> Counter[str]:
    """`entities` as a bag of "key=value"; a list holds several values of its key. Values compare as JSON.

    A null says that there is none, so it is no entity.
    """
    entities = value.get("entities")
    if isinstance(entities, dict):
        lists = {key: item if isinstance(item, list) else [item] for key, item in entities.items()}
        pairs = ((f"{key}=", item) for key, items in lists.items() for item in items)
    elif isinstance(entities, list):
        pairs = (("", item) for item in entities)
    else:
        return Counter()
    return Counter(key + canonical_json(item) for key, item in pairs if item is not None)


METRICS = [
    Metric(
        name="entity_f1",
        title="entity F1",
        column=30,
        description="F1 over the entities of all rows",
        observe=entity_counts,
        field="entities",
        aggregate="micro F1",
    ),
    Metric(
        name="entity_precision",
        title="entity precision",
        column=31,
        description="entities in answers that are expected",
        observe=entity_counts,
        field="entities",
        row_value=lambda counts, out_of_scope: (counts[0], counts[1]),
        aggregate="pooled rate",
        visibility=Visibility.SCORES,
    ),
    Metric(
        name="entity_recall",
        title="entity recall",
        column=32,
        description="expected entities that are in the answers",
        observe=entity_counts,
        field="entities",
        row_value=lambda counts, out_of_scope: (counts[0], counts[2]),
        aggregate="pooled rate",
        visibility=Visibility.SCORES,
    ),
]
