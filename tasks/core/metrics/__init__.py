"""The evaluation metrics: one table, from which scores, gate, comparison, page, MLflow and documentation derive.

To add a metric, add a `Metric` to the list `METRICS` of a module of `definitions`, or add a module there: modules are
discovered. Nothing else lists metrics: `gate.check`, `gate.floors`, scores.json, predictions.jsonl, the report's
columns and `flows.compare` follow. No numpy and no torch at import: flows and configs read this table.
"""

import pkgutil
from collections.abc import Container, Iterator
from importlib import import_module
from typing import Any

from tasks.core.metrics import definitions
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility

__all__ = ["METRICS", "AnsweredRow", "Metric", "Visibility", "observe", "paired_metrics", "primary_metric", "titles"]


def _defined() -> Iterator[Metric]:
    for module in pkgutil.iter_modules(definitions.__path__):
        yield from import_module(f"{definitions.__name__}.{module.name}").METRICS


METRICS = {metric.name: metric for metric in sorted(_defined(), key=lambda metric: (metric.column, metric.name))}
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
