"""Compares two models on the same held-out rows, from the `predictions.jsonl` of their evaluations.

teacher, student = read_predictions(Path("teacher/predictions.jsonl")), read_predictions(Path("student/..."))
for comparison in compare_slices(teacher, student, "exact_match"):
    comparison.slice, comparison.a, comparison.b, comparison.difference, comparison.p
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from tasks.core.errors import BadData
from tasks.core.intervals import Z95, Difference, paired_means, paired_rates
from tasks.core.metrics import METRICS

Prediction = dict[str, Any]
OUT_OF_SCOPE = "out_of_scope"


class Paired(NamedTuple):
    """One slice of the rows: means `a` and `b` of the metric `check`, and b - a with its 95 % interval and p.

    `better` and `worse` count the rows on which b is, and `bound` is the one-sided 95 % lower limit of b - a. p is
    McNemar's exact one where rows are right or wrong.
    """

    slice: str
    check: str
    rows: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    bound: float
    better: int
    worse: int
    p: float


def read_predictions(path: Path) -> list[Prediction]:
    """The rows that an evaluation wrote. Raises BadData when the file is not there or empty."""
    if not path.is_file():
        raise BadData(f"{path} is not there: give the output directory of the evaluate stage")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if not rows:
        raise BadData(f"{path} is empty: there is nothing to compare")
    return rows


def same_rows(a: Sequence[Prediction], b: Sequence[Prediction]) -> list[tuple[Prediction, Prediction]]:
    """Pairs of predictions for the rows that both models answered. Raises BadData when they are of different data."""
    b_rows = {row["row"]: row for row in b}
    pairs = [(row, b_rows[row["row"]]) for row in a if row["row"] in b_rows]
    wrong = next((left["row"] for left, right in pairs if _question(left) != _question(right)), None)
    if wrong is not None:
        raise BadData(f"row {wrong} is another question in the other file: these evaluations are of different datasets")
    if not pairs:
        raise BadData("the two evaluations share no row: nothing can be compared")
    return pairs


def compare(
    pairs: Sequence[tuple[Prediction, Prediction]],
    check: str,
    name: str = "all",
    confidence: float = 0.95,
    out_of_scope: str = OUT_OF_SCOPE,
) -> Paired | None:
    """Metric `check` of b less that of a; `confidence` is that of the one-sided `bound`.

    None when the metric applies to no row.
    """
    metric = METRICS[check]
    values = [tuple(metric.value(row, out_of_scope) for row in pair) for pair in pairs]
    numbers = [(float(a), float(b)) for a, b in values if a is not None and b is not None]
    if not numbers:
        return None
    two_sided = _difference(numbers, Z95)
    bound = _difference(numbers, NormalDist().inv_cdf(confidence)).low
    count = len(numbers)
    means = [sum(pair[side] for pair in numbers) / count for side in (0, 1)]
    return Paired(
        slice=name, check=check, rows=count, a=means[0], b=means[1],
        difference=two_sided.value, low=two_sided.low, high=two_sided.high, bound=bound,
        better=sum(b > a for a, b in numbers), worse=sum(b < a for a, b in numbers), p=two_sided.p,
    )  # fmt: skip


def compare_slices(
    a: Sequence[Prediction], b: Sequence[Prediction], check: str, out_of_scope: str = OUT_OF_SCOPE
) -> list[Paired]:
    """The comparison of all rows, and of each slice: in and out of scope, every intent, questions by length."""
    pairs = same_rows(a, b)
    by_slice = slices([row for row, _ in pairs], out_of_scope)
    comparisons = [
        compare([pairs[index] for index in indices], check, name, out_of_scope=out_of_scope)
        for name, indices in by_slice.items()
    ]
    return [comparison for comparison in comparisons if comparison is not None]


def slices(rows: Sequence[Prediction], out_of_scope: str = OUT_OF_SCOPE) -> dict[str, list[int]]:
    """Indices into `rows` by slice; `all` comes first. Lengths are thirds of the rows by characters of the question."""
    indices = {"all": list(range(len(rows)))}
    intents = [row["intent"][0] if row["intent"] else None for row in rows]
    if any(intents):
        indices["in scope"] = [i for i, intent in enumerate(intents) if intent not in (None, out_of_scope)]
        indices["out of scope"] = [i for i, intent in enumerate(intents) if intent == out_of_scope]
        for name in sorted({intent for intent in intents if intent and intent != out_of_scope}):
            indices[f"intent {name}"] = [i for i, intent in enumerate(intents) if intent == name]
    by_length = sorted(indices["all"], key=lambda i: (len(rows[i]["prompt"]), i))
    third = -(-len(by_length) // 3)
    for number, name in enumerate(("short", "medium", "long")):
        indices[f"{name} questions"] = sorted(by_length[number * third : (number + 1) * third])
    return {name: members for name, members in indices.items() if members}


def disagreements(a: Sequence[Prediction], b: Sequence[Prediction], check: str = "exact_match") -> list[dict[str, Any]]:
    """Rows where only one of the two is right: question, expected answer, both answers; b's losses first."""
    metric = METRICS[check]
    rows = []
    for left, right in same_rows(a, b):
        a_right, b_right = metric.value(left, OUT_OF_SCOPE), metric.value(right, OUT_OF_SCOPE)
        if a_right != b_right:
            row = {key: left[key] for key in ("row", "prompt", "expected")}
            rows.append(row | {"a": left["answer"], "b": right["answer"], "better": bool(b_right)})
    return sorted(rows, key=lambda row: (row["better"], row["row"]))


def _difference(pairs: Sequence[tuple[float, float]], z: float) -> Difference:
    """McNemar's and Newcombe's where every value is right (1) or wrong (0), else those of the mean difference."""
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        return paired_rates(pairs.count((1, 1)), pairs.count((0, 1)), pairs.count((1, 0)), pairs.count((0, 0)), z)
    return paired_means([b - a for a, b in pairs], z)


def _question(row: Prediction) -> tuple[str, str]:
    return row["prompt"], row["expected"]
