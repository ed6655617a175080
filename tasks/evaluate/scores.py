"""The mathematics of scoring: plain values in, plain values out. No model, no files.

A structured row is one whose expected answer is a JSON object (with `intent` and `entities`, where it has them); every
other row is free text.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import json_repair

INVALID = "(no intent)"


class Rate(NamedTuple):
    """`hits` of `of`, with the 95 % Wilson interval (Wilson 1927) from `low` to `high`."""

    value: float
    low: float
    high: float
    hits: int
    of: int


class Judged(NamedTuple):
    """One row's checks. The fields from `json_valid` on are None for free text; `f1` is None for a structured row.

    `intent` is given as the pair (expected, given), and `entities` as counts (true positives, given, expected).
    """

    exact_match: bool
    f1: float | None = None
    json_valid: bool | None = None
    json_valid_after_repair: bool | None = None
    intent: tuple[str, str] | None = None
    entities: tuple[int, int, int] | None = None


def wilson(hits: int, of: int, z: float = 1.959964) -> Rate:
    """The rate `hits`/`of` with its Wilson score interval; `of` must be above 0."""
    p = hits / of
    center = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return Rate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), hits, of)


def judge(expected: str, answer: str) -> Judged:
    """Checks one answer. An answer that is no valid JSON object has no intent and no entities, and is wrong."""
    label = json_object(expected)
    if label is None:
        exact = expected.strip() == answer.strip()
        return Judged(exact, f1=token_f1(expected, answer))
    given = json_object(answer)
    repaired = given is not None or _repairable(answer)
    intent = None
    if isinstance(label.get("intent"), str):
        said = given.get("intent") if given is not None else None
        intent = (label["intent"], said if isinstance(said, str) else INVALID)
    return Judged(
        exact_match=given is not None and same(label, given),
        json_valid=given is not None,
        json_valid_after_repair=repaired,
        intent=intent,
        entities=_overlap(entity_pairs(label), entity_pairs(given or {})) if "entities" in label else None,
    )


def score(judged: Sequence[Judged], out_of_scope: str) -> dict[str, Any]:
    """All scores of a run: `rates` (each a Rate as a dict), `means`, and `confusion` as {expected: {given: rows}}.

    A score that no row speaks of is left out.
    """
    if not judged:
        raise ValueError("no rows to score")
    rates = {"exact_match": _rate(row.exact_match for row in judged)}
    rates["json_valid"] = _rate(row.json_valid for row in judged)
    rates["json_valid_after_repair"] = _rate(row.json_valid_after_repair for row in judged)
    intents = [row.intent for row in judged if row.intent is not None]
    rates["intent_accuracy"] = _rate(expected == given for expected, given in intents)
    rates["out_of_scope_recall"] = _rate(
        given == out_of_scope for expected, given in intents if expected == out_of_scope
    )
    rates["out_of_scope_precision"] = _rate(
        expected == out_of_scope for expected, given in intents if given == out_of_scope
    )
    means = {}
    entities = [row.entities for row in judged if row.entities is not None]
    hits, given_pairs, expected_pairs = (sum(row[i] for row in entities) for i in range(3))
    if given_pairs:
        rates["entity_precision"] = wilson(hits, given_pairs)
    if expected_pairs:
        rates["entity_recall"] = wilson(hits, expected_pairs)
        means["entity_f1"] = 2 * hits / (given_pairs + expected_pairs)
    if intents:
        means["intent_macro_f1"] = macro_f1(intents)
    texts = [row.f1 for row in judged if row.f1 is not None]
    if texts:
        means["token_f1"] = sum(texts) / len(texts)
    return {
        "rows": len(judged),
        "rates": {name: rate._asdict() for name, rate in rates.items() if rate is not None},
        "means": means,
        "confusion": confusion(intents),
    }


def confusion(intents: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """{expected: {given: rows}}, names sorted."""
    counts: dict[str, Counter[str]] = {}
    for expected, given in intents:
        counts.setdefault(expected, Counter())[given] += 1
    return {expected: dict(sorted(row.items())) for expected, row in sorted(counts.items())}


def macro_f1(intents: Sequence[tuple[str, str]]) -> float:
    """The mean F1 of the intents that are expected anywhere; an intent never expected counts by what it takes away."""
    labels = sorted({expected for expected, _ in intents})
    hits = Counter(expected for expected, given in intents if expected == given)
    expected_counts = Counter(expected for expected, _ in intents)
    given_counts = Counter(given for _, given in intents)
    return sum(2 * hits[label] / (expected_counts[label] + given_counts[label]) for label in labels) / len(labels)


def token_f1(expected: str, answer: str) -> float:
    """F1 over words as bags, lower case, punctuation apart (SQuAD's measure, articles kept); 1 when both are empty."""
    left, right = (Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in (expected, answer))
    if not left and not right:
        return 1.0
    return 2 * (left & right).total() / (left.total() + right.total())


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is anything else (NaN and Infinity are no JSON)."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same(left: Any, right: Any) -> bool:
    """Equal as JSON: key order and spacing do not count, types do (1 is not true, nor is "1" 1)."""
    return _canonical(left) == _canonical(right)


def entity_pairs(value: dict[str, Any]) -> Counter[str]:
    """`entities` as a bag of "key=value"; a list holds several values of its key. Values compare as JSON."""
    entities = value.get("entities")
    if isinstance(entities, dict):
        items = [(key, one) for key, many in entities.items() for one in (many if isinstance(many, list) else [many])]
        return Counter(f"{key}={_canonical(one)}" for key, one in items)
    return Counter(_canonical(one) for one in entities) if isinstance(entities, list) else Counter()


def _overlap(expected: Counter[str], given: Counter[str]) -> tuple[int, int, int]:
    return (expected & given).total(), given.total(), expected.total()


def _rate(checks: Iterable[bool | None]) -> Rate | None:
    known = [check for check in checks if check is not None]
    return wilson(sum(known), len(known)) if known else None


def _repairable(text: str) -> bool:
    repaired = json_repair.loads(text) if "{" in text else None
    return isinstance(repaired, dict) and bool(repaired)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
