"""One answer against what was expected: plain values in, plain values out. No model, no files.

A structured row is one whose expected answer is a JSON object (with `intent` and `entities`, where it has them); every
other row is free text.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import json_repair
from rapidfuzz.distance import LCSseq

INVALID = "(no intent)"


class Judged(NamedTuple):
    """One row's checks. The fields from `json_valid` on are None for free text; `f1`, `rouge_l` for a structured row.

    `intent` is given as the pair (expected, given), and `entities` as counts (true positives, given, expected).
    `schema_valid` is None where there is no schema, `metric` where the user brought none.
    """

    exact_match: bool
    f1: float | None = None
    rouge_l: float | None = None
    json_valid: bool | None = None
    json_valid_after_repair: bool | None = None
    schema_valid: bool | None = None
    intent: tuple[str, str] | None = None
    entities: tuple[int, int, int] | None = None
    metric: float | None = None


def judge(expected: str, answer: str, keeps_schema: Callable[[Any], bool] | None = None) -> Judged:
    """Checks one answer. An answer that is no valid JSON object has no intent and no entities, and is wrong."""
    label = json_object(expected)
    if label is None:
        exact = expected.strip() == answer.strip()
        return Judged(exact, f1=token_f1(expected, answer), rouge_l=rouge_l(expected, answer))
    given = json_object(answer)
    intent = None
    if isinstance(label.get("intent"), str):
        said = given.get("intent") if given is not None else None
        intent = (label["intent"], said if isinstance(said, str) else INVALID)
    return Judged(
        exact_match=given is not None and same(label, given),
        json_valid=given is not None,
        json_valid_after_repair=given is not None or _repairable(answer),
        schema_valid=None if keeps_schema is None else given is not None and keeps_schema(given),
        intent=intent,
        entities=_overlap(entity_pairs(label), entity_pairs(given or {})) if "entities" in label else None,
    )


def token_f1(expected: str, answer: str) -> float:
    """F1 over words as bags, lower case, punctuation apart (SQuAD's measure, articles kept); 1 when both are empty."""
    left, right = Counter(_words(expected)), Counter(_words(answer))
    if not left and not right:
        return 1.0
    return 2 * (left & right).total() / (left.total() + right.total())


def rouge_l(expected: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), lower case, no stemming, punctuation left out.

    1 when neither has a word.
    """
    left, right = (re.findall(r"\w+", text.lower()) for text in (expected, answer))
    if not left and not right:
        return 1.0
    return float(2 * LCSseq.similarity(left, right) / (len(left) + len(right)))


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


def _repairable(text: str) -> bool:
    repaired = json_repair.loads(text) if "{" in text else None
    return isinstance(repaired, dict) and bool(repaired)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
