"""Infers the JSON schema of the training answers, and validates answers against it.

One object type an intent, where answers have one, for entities differ by intent. Keys are in their usual order; those
that every answer has are required, others optional, unknown ones not allowed.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from tasks.core.metrics.json_values import json_object
from tasks.evaluate.generation import Schema

Value = dict[str, Any]
SchemaCheck = Callable[[Any], bool]
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def infer_schema(answers: Iterable[str]) -> Schema | None:
    """The schema of these answers; None when one of them is no JSON object, or there is none."""
    objects = []
    for answer in answers:
        value = json_object(answer)
        if value is None:
            return None
        objects.append(value)
    if not objects:
        return None
    if not all(isinstance(value.get("intent"), str) for value in objects):
        return _object(objects)
    by_intent: dict[str, list[Value]] = defaultdict(list)
    for value in objects:
        by_intent[value["intent"]].append(value)
    kinds = [_object(group) for _, group in sorted(by_intent.items())]
    for kind, name in zip(kinds, sorted(by_intent), strict=True):
        kind["properties"]["intent"] = {"const": name}
    return {"anyOf": kinds} if len(kinds) > 1 else kinds[0]


def decoding_schema(schema: Schema, answers: Sequence[str]) -> Schema:
    """The schema for constrained decoding: spacing fixed to that of these answers, or else to that of `json.dumps`.

    Free spacing would let an unsure model write white space for ever. `x-guidance` is llguidance's key, which
    llama.cpp's server reads where it was built with llguidance, as xllamacpp is.
    """
    compact = bool(answers) and all(_compact(answer) == answer for answer in answers)
    item, key = (",", ":") if compact else (", ", ": ")
    spacing = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    return {**schema, "x-guidance": spacing}


def schema_validator(schema: Schema) -> SchemaCheck:
    """A function that tells whether a value (of at most `MAX_DEPTH`) is valid under the schema."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - not for free text
    from jsonschema.validators import extend  # noqa: PLC0415

    standard = Draft202012Validator.TYPE_CHECKER
    types = standard.redefine("integer", lambda _, value: _is_integral(value) or standard.is_type(value, "integer"))
    validator = extend(Draft202012Validator, type_checker=types)(schema)
    return lambda value: bool(validator.is_valid(value))


def _object(values: Sequence[Value]) -> Schema:
    positions: dict[str, list[int]] = defaultdict(list)
    for value in values:
        for position, key in enumerate(value):
            positions[key].append(position)
    keys = sorted(positions, key=lambda key: (sum(positions[key]) / len(positions[key]), key))
    return {
        "type": "object",
        "properties": {key: _any([value[key] for value in values if key in value]) for key in keys},
        "required": [key for key in keys if len(positions[key]) == len(values)],
        "additionalProperties": False,
    }


def _any(values: Sequence[Any]) -> Schema:
    """The schema of all values of one key."""
    kinds: list[Schema] = []
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        kinds.append(_object(objects))
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        items = [item for value in lists for item in value]
        kinds.append({"type": "array", "items": _any(items)} if items else {"type": "array"})
    names = sorted({_type_name(value) for value in values if not isinstance(value, (dict, list))})
    if "number" in names and "integer" in names:
        names.remove("integer")
    kinds += [{"type": name} for name in names]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _type_name(value: Any) -> str:
    return "integer" if _is_integral(value) else "number" if isinstance(value, Decimal) else NAMES[type(value)]


def _is_integral(value: Any) -> bool:
    """Whether a number that no int or float of Python's holds is an integer."""
    return isinstance(value, Decimal) and int(value.as_tuple().exponent) >= 0


def _compact(answer: str) -> str | None:
    """The answer without blanks between its tokens; None for numbers that Python writes otherwise."""
    try:
        return json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False)
    except ValueError:
        return None
