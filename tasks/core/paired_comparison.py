"""Two models on the same held-out rows, from the `predictions.jsonl` of their evaluations: where one is better.

teacher, student = read_predictions(Path("teacher/predictions.jsonl")), read_predictions(Path("student/..."))
for one in transfer(teacher, student, "exact_match"):
    one.slice, one.a, one.b, one.difference, one.p
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from tasks.core.errors import BadData
from tasks.core.intervals import Z95, Difference, mcnemar, paired_means, paired_rates

Prediction = dict[str, Any]
CHECKS: dict[str, Callable[[Prediction], float | bool | None]] = {
    "exact_match": lambda row: row["exact_match"],
    "intent_accuracy": lambda row: None if row["intent"] is None else row["intent"][0] == row["intent"][1],
    "json_valid": lambda row: row["json_valid"],
    "json_valid_after_repair": lambda row: row["json_valid_after_repair"],
    "schema_valid": lambda row: row.get("schema_valid"),
    "token_f1": lambda row: row["f1"],
    "rouge_l": lambda row: row.get("rouge_l"),
    "metric": lambda row: row.get("metric"),
}
"""What a row can be compared by: right or wrong, or a number; None where the row does not speak of it."""


class Paired(NamedTuple):
    """One slice of the rows: means `a` and `b`, and b - a with its 95 % interval and p (McNemar exact for rates).

    `better` and `worse` count the rows on which b is, and `bound` is the one-sided 95 % lower limit of b - a.
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
    """The predictions of both for the rows that both were asked. Raises BadData when they are of different data."""
    theirs = {row["row"]: row for row in b}
    pairs = [(row, theirs[row["row"]]) for row in a if row["row"] in theirs]
    wrong = next((one["row"] for one, other in pairs if _question(one) != _question(other)), None)
    if wrong is not None:
        raise BadData(f"row {wrong} is another question in the other file: these evaluations are of different datasets")
    if not pairs:
        raise BadData("the two evaluations share no row: nothing can be compared")
    return pairs


def compare(
    pairs: Sequence[tuple[Prediction, Prediction]], check: str, name: str = "all", confidence: float = 0.95
) -> Paired | None:
    """`check` of b less that of a; `confidence` is that of the one-sided `bound`. None when no row speaks of it."""
    values = [(CHECKS[check](a), CHECKS[check](b)) for a, b in pairs]
    known = [(float(a), float(b)) for a, b in values if a is not None and b is not None]
    if not known:
        return None
    better, worse = sum(b > a for a, b in known), sum(b < a for a, b in known)
    two_sided = _difference(known, better, worse, Z95)
    bound = _difference(known, better, worse, NormalDist().inv_cdf(confidence)).low
    count = len(known)
    a, b = (sum(pair[i] for pair in known) / count for i in range(2))
    return Paired(
        name, check, count, a, b, two_sided.value, two_sided.low, two_sided.high, bound, better, worse, two_sided.p
    )


def transfer(
    a: Sequence[Prediction], b: Sequence[Prediction], check: str, out_of_scope: str = "out_of_scope"
) -> list[Paired]:
    """The comparison of all rows, and of each slice: in and out of scope, every intent, questions by length."""
    pairs = same_rows(a, b)
    named = slices([row for row, _ in pairs], out_of_scope)
    found = [compare([pairs[place] for place in places], check, name) for name, places in named.items()]
    return [one for one in found if one is not None]


def slices(rows: Sequence[Prediction], out_of_scope: str = "out_of_scope") -> dict[str, list[int]]:
    """Places in `rows` by slice; `all` comes first. Lengths are thirds of the rows by characters of the question."""
    found = {"all": list(range(len(rows)))}
    intents = [row["intent"][0] if row["intent"] else None for row in rows]
    if any(intents):
        found["in scope"] = [i for i, intent in enumerate(intents) if intent not in (None, out_of_scope)]
        found["out of scope"] = [i for i, intent in enumerate(intents) if intent == out_of_scope]
        for name in sorted({intent for intent in intents if intent and intent != out_of_scope}):
            found[f"intent {name}"] = [i for i, intent in enumerate(intents) if intent == name]
    order = sorted(found["all"], key=lambda i: (len(rows[i]["prompt"]), i))
    third = -(-len(order) // 3)
    for place, name in enumerate(("short", "medium", "long")):
        found[f"{name} questions"] = sorted(order[place * third : (place + 1) * third])
    return {name: places for name, places in found.items() if places}


def disagreements(a: Sequence[Prediction], b: Sequence[Prediction], check: str = "exact_match") -> list[dict[str, Any]]:
    """Rows where only one of the two is right: question, expected answer, both answers; b's losses first."""
    right = CHECKS[check]
    found = [
        {key: one[key] for key in ("row", "prompt", "expected")}
        | {"a": one["answer"], "b": other["answer"], "better": bool(right(other))}
        for one, other in same_rows(a, b)
        if right(one) != right(other)
    ]
    return sorted(found, key=lambda row: (row["better"], row["row"]))


def _difference(known: Sequence[tuple[float, float]], better: int, worse: int, z: float) -> Difference:
    if all(value in (0.0, 1.0) for pair in known for value in pair):
        both = sum(a == b == 1.0 for a, b in known)
        return paired_rates(both, better, worse, len(known) - both - better - worse, z)._replace(
            p=mcnemar(better, worse)
        )
    return paired_means([b - a for a, b in known], z)


def _question(row: Prediction) -> tuple[str, str]:
    return row["prompt"], row["expected"]
