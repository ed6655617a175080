"""JSON read exactly: numbers as they are written, no field twice, a bounded depth.

    load(b'{"price": 1.10}')    ->  {"price": Number("1.10")}, which `dump` writes as 1.10 again

orjson parses every row. It rounds integers beyond 64 bits and decimals, and keeps the last of two equal keys, without
an error; so its result stands only where `_is_plain` rules this out, and json parses all other rows.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import orjson

from tasks.ingest.json_errors import json_error_reason

MAX_DEPTH = 200
MAX_DIGITS = 4300  # of an integer, as Python reads it
STRINGS = {str}
ESCAPE = re.compile(rb"\\.", re.DOTALL)


class Number(float):
    """A JSON number whose text is not the one that Python would write for its value."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "Number":
        """The number of this text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type["Number"], tuple[str]]:
        """What pickle makes it anew from."""
        return Number, (self.text,)


def load(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError with the reason where it is none, or cannot be kept as it is."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return _load_exactly(data)
    return value if _is_plain(data, value) else _load_exactly(data)


def load_row(line: bytes) -> Any:
    """`load` for a line of JSONL, which may end in the comma of an array without its brackets."""
    try:
        return load(line)
    except ValueError:
        element = line.rstrip()
        if not element.endswith(b"},"):
            raise
        return load(element[:-1])


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is not one. Raises ValueError for an object that cannot be kept."""
    if text[:1] != "{" and not text.lstrip().startswith("{"):
        return None
    data = text.encode(errors="surrogatepass")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        with suppress(json.JSONDecodeError):
            _parse(text)  # raises for what cannot be kept
        return None  # also half of a surrogate pair, which json lets through
    if not _is_plain(data, value):
        value = _parse(text)
    return value if isinstance(value, dict) else None


def dump(value: Any) -> str:
    """JSON with the spaces that people write, and every number as it was read."""
    return _dump(value, _written, ", ", ": ", in_order=False) if _has_number(value) else _json(value)


def comparison_key(value: Any) -> bytes:
    """Bytes that are equal for equal values, however their keys are ordered and their numbers written."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer beyond 64 bits, or a Number
        return _dump(value, _comparable, ",", ":", in_order=True).encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_plain(data: bytes, value: Any) -> bool:
    """Whether a parsed value is all that its text says: no float in it, no key lost, no great depth.

    Two equal keys leave fewer strings in the value than the text has pairs of quotes.
    """
    quotes = data.count(b'"')
    if b"\\" in data:
        quotes = ESCAPE.sub(b"", data).count(b'"') if b"\\\\" in data else quotes - data.count(b'\\"')
    strings = _strings(value, MAX_DEPTH)
    return strings is not None and 2 * strings == quotes


def _strings(value: Any, depth: int) -> int | None:
    """How many strings a value holds, keys included; None where a float is in it, or more than `depth` levels."""
    kind = type(value)
    if kind is str:
        return 1
    if kind is not dict and kind is not list:
        return None if kind is float else 0
    if not depth:
        return None
    items = value.values() if kind is dict else value
    count = len(value) if kind is dict else 0
    if set(map(type, items)) == STRINGS:
        return count + len(items)
    for item in items:
        if type(item) is str:
            count += 1
        elif item is not None:
            inner = _strings(item, depth - 1)
            if inner is None:
                return None
            count += inner
    return count


def _load_exactly(data: bytes) -> Any:
    try:
        text = data.decode()
        value = _parse(text)
        text.encode()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(json_error_reason(data)) from error
    try:
        _json(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(json_error_reason(data)) from error
    return value


def _parse(text: str) -> Any:
    """The value, with each number as it is written. Raises json.JSONDecodeError, or ValueError with the reason."""
    try:
        value = json.loads(
            text,
            parse_float=_number,
            parse_int=_integer,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(f"not JSON that can be read: nested more than {MAX_DEPTH} deep") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"not JSON that can be read: nested more than {MAX_DEPTH} deep")
    return value


def _constant(name: str) -> Any:
    raise json.JSONDecodeError(name, "", 0)  # the reason is found by json_error_reason


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {_short(text)} is out of range: the largest is about 1.8e308; write it as text")
    return number if repr(number) == text else Number(text)


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {_short(text)} has {len(text)} digits, more than {MAX_DIGITS}; write it as text")
    return Number(text) if text == "-0" else int(text)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {repeated!r} stands twice in one object: keep the right one")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    if not depth:
        return True
    return any(_is_deeper(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _has_number(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_number, value.values() if isinstance(value, dict) else value))
    return type(value) is Number


def _dump(value: Any, scalar: Callable[[Any], str], comma: str, colon: str, *, in_order: bool) -> str:
    """JSON of a value whose scalars are written by `scalar`; `in_order` sorts the keys."""
    if isinstance(value, dict):
        fields = sorted(value.items()) if in_order else value.items()
        inner = (scalar(name) + colon + _dump(item, scalar, comma, colon, in_order=in_order) for name, item in fields)
        return "{" + comma.join(inner) + "}"
    if isinstance(value, list):
        return "[" + comma.join(_dump(item, scalar, comma, colon, in_order=in_order) for item in value) + "]"
    return scalar(value)


def _written(value: Any) -> str:
    return value.text if type(value) is Number else _json(value)


def _comparable(value: Any) -> str:
    """A scalar as orjson writes it; 1.10 as 1.1, and digits that a float has no room for in full."""
    if type(value) is int:
        return str(value)
    if type(value) is not Number:
        return orjson.dumps(value).decode()
    exact = Decimal(value.text)
    plain = float(value)
    return orjson.dumps(plain).decode() if Decimal(repr(plain)) == exact else str(exact.normalize())
