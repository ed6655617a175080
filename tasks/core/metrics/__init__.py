"""The evaluation metrics: one table, from which scores, gate, comparison, page, MLflow and documentation derive.

To add a metric, add one `Metric` to the file of its kind (or a new file here, with one import). Nothing else lists
metrics: `gate.check`, `gate.floors`, scores.json, predictions.jsonl, the report's columns and `flows.compare` follow.
No numpy and no torch at import: flows and configs read this table.
"""

from collections.abc import Container
from typing import Any

from tasks.core.metrics import entities, exact_match, free_text, intents, json_answers, out_of_scope, user_metric
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility

__all__ = ["METRICS", "AnsweredRow", "Metric", "Visibility", "observe", "paired_metrics", "primary_metric", "titles"]

_KINDS = (json_answers, intents, entities, exact_match, out_of_scope, free_text, user_metric)
METRICS: dict[str, Metric] = {metric.name: metric for kind in _KINDS for metric in kind.METRICS}
"""Every metric by name, in the order of the tables' columns."""


def observe(row: AnsweredRow) -> dict[str, Any]:
    """What the row shows every metric, by field of predictions.jsonl; None where a metric does not apply."""
    observers = {metric.field: metric.observe for metric in METRICS.values()}
    return {field: observer(row) for field, observer in observers.items()}


def paired_metrics() -> list[str]:
    """Names of the metrics that models are compared by row by row."""
    return [metric.name for metric in METRICS.values() if metric.paired]


def titles(visibility: Visibility) -> dict[str, str]:
    """Titles by name of the metrics that are shown at this level."""
    return {metric.name: metric.title for metric in METRICS.values() if metric.visibility >= visibility}


def primary_metric(scores: Container[str]) -> str:
    """The metric that stands for a model's quality: exact match where answers are JSON, token F1 where they are text.

    `scores` are the names of the scores that an evaluation has.
    """
    return "exact_match" if "json_valid" in scores else "token_f1"
