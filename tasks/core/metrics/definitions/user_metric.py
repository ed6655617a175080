"""The metric that the user wrote: `evaluate.metric` names its function."""

from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility


def user_metric(row: AnsweredRow) -> float | None:
    """The user's function of the row; None where `evaluate.metric` is not set."""
    return None if row.user_metric is None else row.user_metric(row.question, row.expected, row.answer)


METRICS = [
    Metric(
        name="metric",
        title="own metric",
        column=90,
        description="your own function, named by `evaluate.metric`",
        observe=user_metric,
        aggregate="mean",
        paired=True,
        visibility=Visibility.TERMINAL,
    )
]
