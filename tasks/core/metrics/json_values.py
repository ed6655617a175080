"""JSON answers as values: parsing that accepts what every reader accepts, and equality that ignores spelling."""

import json
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_DEPTH = 100
"""Objects and lists inside each other; a deeper answer is no JSON here, for readers differ in where they give up."""
MAX_DIGITS = 4000
"""Digits of an integer that Python converts; a longer one is a Decimal."""


def json_value(text: str) -> Any:
    """`text` as a JSON value; ValueError for anything else.

    NaN, Infinity, halves of surrogate pairs and a nesting beyond MAX_DEPTH are no JSON. Numbers that no float or int
    holds are Decimals, so that none is lost.
    """
    if not text.strip():
        raise ValueError("an empty text is no JSON")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_decimal_or_float)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check(value)
    return value


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is anything else."""
    try:
        value = json_value(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def comparable_json(text: str) -> str | None:
    """Canonical JSON of a text that is an object, a list or a number; None for any other, which compares as text."""
    try:
        value = json_value(text)
    except ValueError:
        return None
    is_value = isinstance(value, (dict, list, int, float, Decimal)) and not isinstance(value, bool)
    return canonical_json(value) if is_value else None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, equal for equal values: 1 is 1.0, lists have an order, and 1 is neither true nor "1"."""
    if isinstance(value, dict):
        items = (f"{canonical_json(str(key))}: {canonical_json(item)}" for key, item in sorted(value.items()))
        return "{" + ", ".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(canonical_json, value)) + "]"
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _canonical_number(value)
    return json.dumps(value, ensure_ascii=False)


def _canonical_number(value: int | float | Decimal) -> str:
    """The number as its shortest digits and a power of ten, so that 1, 1.0 and 10e-1 are the same."""
    sign, digits, exponent = (value if isinstance(value, Decimal) else Decimal(repr(value))).as_tuple()
    significant = "".join(map(str, digits)).lstrip("0")
    stripped = significant.rstrip("0")
    if not stripped:
        return "0"
    power = int(exponent) + len(significant) - len(stripped)
    number = stripped + "0" * power if 0 <= power <= 20 else f"{stripped}e{power}"
    return f"-{number}" if sign else number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) <= MAX_DIGITS else Decimal(text)


def _decimal_or_float(text: str) -> float | Decimal:
    """A float where it is finite, and not 0 for a number that is not; else the number as written."""
    value = float(text)
    if value not in (float("inf"), float("-inf")) and (value or not text.strip("-0.eE+")):
        return value
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError("an exponent beyond every number") from error


def _check(value: Any) -> None:
    """Raises ValueError for half of a surrogate pair in a string, or too deep a nesting."""
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= character <= "\udfff" for character in item):
                raise ValueError("half of a surrogate pair is no character")
        elif isinstance(item, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
            if isinstance(item, dict):
                pending += [(key, depth) for key in item]
            pending += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
