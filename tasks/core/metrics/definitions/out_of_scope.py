"""Metrics of declining: questions out of scope, by the intent that `out_of_scope_intent` names."""

from tasks.core.metrics.definitions.intents import intent_pair
from tasks.core.metrics.metric import Metric, Visibility


def _recalled(pair: tuple[str, str], out_of_scope: str) -> bool | None:
    expected, predicted = pair
    return predicted == out_of_scope if expected == out_of_scope else None


def _precise(pair: tuple[str, str], out_of_scope: str) -> bool | None:
    expected, predicted = pair
    return expected == out_of_scope if predicted == out_of_scope else None


METRICS = [
    Metric(
        name="out_of_scope_recall",
        title="out-of-scope recall",
        column=50,
        description="questions out of scope that are declined",
        observe=intent_pair,
        field="intent",
        row_value=_recalled,
        aggregate="rate",
        visibility=Visibility.SUMMARY,
    ),
    Metric(
        name="out_of_scope_precision",
        title="out-of-scope precision",
        column=51,
        description="declined questions that are out of scope",
        observe=intent_pair,
        field="intent",
        row_value=_precise,
        aggregate="rate",
    ),
]
