"""Metrics of an answer's form: valid JSON, valid after repair, valid under the schema of the training answers."""

import re

from tasks.core.metrics.json_values import MAX_DEPTH
from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility

LONGEST_REPAIR = 100_000
"""Characters of an answer that is given to `json_repair`, whose time grows faster than the text."""


def json_valid(row: AnsweredRow) -> bool | None:
    """Whether the answer is a JSON object, where the expected one is."""
    return None if row.expected_object is None else row.answer_object is not None


def json_valid_after_repair(row: AnsweredRow) -> bool | None:
    """Whether `json_repair` makes a JSON object of the answer."""
    if row.expected_object is None:
        return None
    return row.answer_object is not None or _repairable(row.answer)


def schema_valid(row: AnsweredRow) -> bool | None:
    """Whether the answer is valid under the schema; None without a schema."""
    if row.expected_object is None or row.matches_schema is None:
        return None
    return row.answer_object is not None and row.matches_schema(row.answer_object)


def _repairable(text: str) -> bool:
    import json_repair  # noqa: PLC0415  (flows import this module)

    if "{" not in text or len(text) > LONGEST_REPAIR or _open_brackets(text) > MAX_DEPTH:
        return False
    try:
        repaired = json_repair.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(repaired, dict) and bool(repaired)


def _open_brackets(text: str) -> int:
    """The most brackets that are open at one place: `json_repair` takes minutes for thousands, then gives up."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


METRICS = [
    Metric(
        name="json_valid",
        title="JSON valid",
        column=10,
        description="answers that are a JSON object as they stand",
        observe=json_valid,
        aggregate="rate",
        paired=True,
        visibility=Visibility.SUMMARY,
    ),
    Metric(
        name="json_valid_after_repair",
        title="JSON valid after repair",
        column=11,
        description="answers that are a JSON object once `json_repair` has mended them",
        observe=json_valid_after_repair,
        aggregate="rate",
        visibility=Visibility.SCORES,
    ),
    Metric(
        name="schema_valid",
        title="schema valid",
        column=12,
        description="answers that keep to the JSON schema of the training answers",
        observe=schema_valid,
        aggregate="rate",
        paired=True,
    ),
]
