"""Metrics of the `intent` of JSON answers: accuracy and macro-F1."""

from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility

INVALID = "(no intent)"
"""The intent of an answer that is no JSON object or has none."""


def intent_pair(row: AnsweredRow) -> tuple[str, str] | None:
    """The row's intents (expected, predicted); None where no intent is expected."""
    expected = (row.expected_object or {}).get("intent")
    if not isinstance(expected, str):
        return None
    predicted = (row.answer_object or {}).get("intent")
    return expected, predicted if isinstance(predicted, str) else INVALID


METRICS = [
    Metric(
        name="intent_accuracy",
        title="intent",
        column=20,
        description="rows whose intent is the expected one",
        observe=intent_pair,
        field="intent",
        row_value=lambda pair, out_of_scope: pair[0] == pair[1],
        aggregate="rate",
        paired=True,
        visibility=Visibility.SUMMARY,
    ),
    Metric(
        name="intent_macro_f1",
        title="intent macro-F1",
        column=21,
        description="mean F1 of the intents that are expected in any row",
        observe=intent_pair,
        field="intent",
        aggregate="macro F1",
    ),
]
