"""What an evaluation metric declares. The table of all metrics is `tasks.core.metrics.METRICS`."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

from tasks.core.metrics.json_values import json_object

Aggregate = Literal["rate", "pooled rate", "mean", "micro F1", "macro F1"]
"""How rows become a score: the share of rows that are right, or of pooled counts (both with Wilson's interval); the
mean of a number a row, F1 of pooled counts, or the mean of the classes' F1 (these with a bootstrap's interval)."""


@dataclass(frozen=True)
class AnsweredRow:
    """A held-out row with a model's answer: the input of every metric.

    `matches_schema` tells whether a JSON value is valid under the schema of the training answers, where there is one;
    `user_metric` is the function of (question, expected, answer) that `evaluate.metric` names.
    """

    question: str
    expected: str
    answer: str
    matches_schema: Callable[[Any], bool] | None = None
    user_metric: Callable[[str, str, str], float] | None = None

    @cached_property
    def expected_object(self) -> dict[str, Any] | None:
        """The expected answer as a JSON object; None for free text."""
        return json_object(self.expected)

    @cached_property
    def answer_object(self) -> dict[str, Any] | None:
        """The model's answer as a JSON object; None when it is not a valid one."""
        return json_object(self.answer)


class Visibility(IntEnum):
    """Where a score is shown; each level includes the ones before it."""

    SCORES = 0
    """In scores.json and in MLflow's run of the evaluation."""
    PAGE = 1
    """As a column of the report page, and in the evaluation's facts."""
    TERMINAL = 2
    """In the table at the end of a run."""
    SUMMARY = 3
    """In every model's row of summary.json (null without a value), Prefect's table and MLflow's run of the flow."""


def _same_value(observation: Any, out_of_scope: str) -> Any:
    return observation


@dataclass(frozen=True)
class Metric:
    """A score of a model's answers: a fraction from 0 to 1 where more is better, shown in percent.

    Every metric may be a floor of the gate; one with `paired` may also be its `check`, and is compared between models
    row by row (McNemar's exact test where a row is right or wrong, a z test of the mean difference else).
    """

    name: str
    """Key in scores.json, in `gate.floors` and `gate.check`, and in MLflow."""
    title: str
    """Heading of its column in tables."""
    description: str
    """One line for the documentation."""
    observe: Callable[[AnsweredRow], Any]
    """What a row shows, as JSON; None where the metric does not apply to the row."""
    aggregate: Aggregate
    """How the rows' values become the score."""
    field: str = ""
    """Key of the observation in predictions.jsonl; metrics with the same field share `observe`. Default: `name`."""
    row_value: Callable[[Any, str], Any] = _same_value
    """The row's own value from its observation and the name of the out-of-scope intent; None leaves the row out.

    A bool for a rate, (hits, total) for a pooled rate, a number for a mean."""
    paired: bool = False
    """Whether the gate and `flows.compare` compare models by it row by row."""
    visibility: Visibility = Visibility.PAGE
    column: int = 100
    """Order of the tables' columns, from left to right; equal ones by name."""

    def __post_init__(self) -> None:
        if not self.field:
            object.__setattr__(self, "field", self.name)

    def value(self, prediction: dict[str, Any], out_of_scope: str) -> Any:
        """`row_value` of a row of predictions.jsonl; None where the metric does not apply to the row."""
        observation = prediction.get(self.field)
        return None if observation is None else self.row_value(observation, out_of_scope)
