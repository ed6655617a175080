"""Exact match: equal as JSON where the expected answer is an object, a list or a number, else equal as text."""

from tasks.core.metrics.json_values import comparable_json
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility


def exact_match(row: AnsweredRow) -> bool:
    """Order of keys, spacing and 1 or 1.0 do not count in JSON, order in lists and types do.

    Text is compared without its outer white space.
    """
    expected = comparable_json(row.expected)
    if expected is None:
        return row.expected.strip() == row.answer.strip()
    return expected == comparable_json(row.answer)


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
