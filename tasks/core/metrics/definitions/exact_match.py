"""Exact match: equal as JSON where the expected answer is an object, else equal as text."""

from tasks.core.metrics.json_values import canonical_json
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility


def exact_match(row: AnsweredRow) -> bool:
    """Order of keys and spacing do not count in JSON, types do; text is compared without its outer white space."""
    if row.expected_object is None:
        return row.expected.strip() == row.answer.strip()
    return row.answer_object is not None and canonical_json(row.expected_object) == canonical_json(row.answer_object)


METRICS = [
    Metric(
        name="exact_match",
        title="exact match",
        column=40,
        description="answers equal to the expected one: as JSON, or as text without outer white space",
        observe=exact_match,
        aggregate="rate",
        paired=True,
        visibility=Visibility.SUMMARY,
    )
]
