"""The JSON schema that training answers have in common, and whether an answer keeps to it.

One object type an intent, where answers have one: its entities differ. Keys keep their usual order, those that every
answer has are required, others may be left out, unknown ones are not allowed.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tasks.evaluate.generation import Schema

Value = dict[str, Any]
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def infer_schema(answers: Iterable[str]) -> Schema | None:
    """The schema of these answers; None when one of them is no JSON object, or there is none."""
    objects = []
    for answer in answers:
        try:
            value = json.loads(answer)
        except ValueError:
            return None
        if not isinstance(value, dict):
            return None
        objects.append(value)
    if not objects:
        return None
    if not all(isinstance(one.get("intent"), str) for one in objects):
        return _object(objects)
    by_intent: dict[str, list[Value]] = defaultdict(list)
    for one in objects:
        by_intent[one["intent"]].append(one)
    kinds = [_object(group) for _, group in sorted(by_intent.items())]
    for kind, name in zip(kinds, sorted(by_intent), strict=True):
        kind["properties"]["intent"] = {"const": name}
    return {"anyOf": kinds} if len(kinds) > 1 else kinds[0]


def held_to(schema: Schema, answers: Sequence[str]) -> Schema:
    """The schema as decoding is held to it: spaced as all these answers are, or else as `json.dumps` does.

    Free spacing would let an unsure model write white space for ever. `x-guidance` is llguidance's word, which
    llama.cpp's server understands where it was built with it, as xllamacpp is.
    """
    compact = bool(answers) and all(_compact(one) == one for one in answers)
    item, key = (",", ":") if compact else (", ", ": ")
    spacing = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    return {**schema, "x-guidance": spacing}


def checker(schema: Schema) -> Callable[[Any], bool]:
    """A function that says whether a value keeps to the schema."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - not for free text

    validator = Draft202012Validator(schema)
    return lambda value: bool(validator.is_valid(value))


def _object(values: Sequence[Value]) -> Schema:
    places: dict[str, list[int]] = defaultdict(list)
    for value in values:
        for place, key in enumerate(value):
            places[key].append(place)
    keys = sorted(places, key=lambda key: (sum(places[key]) / len(places[key]), key))
    return {
        "type": "object",
        "properties": {key: _any([value[key] for value in values if key in value]) for key in keys},
        "required": [key for key in keys if len(places[key]) == len(values)],
        "additionalProperties": False,
    }


def _any(values: Sequence[Any]) -> Schema:
    """What all the values of one key have in common."""
    found: list[Schema] = []
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        found.append(_object(objects))
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        items = [item for value in lists for item in value]
        found.append({"type": "array", "items": _any(items)} if items else {"type": "array"})
    names = sorted({NAMES[type(value)] for value in values if not isinstance(value, (dict, list))})
    if "number" in names and "integer" in names:
        names.remove("integer")
    found += [{"type": name} for name in names]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _compact(answer: str) -> str:
    return json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False)
