"""JSON answers as values: parsing that accepts JSON objects alone, and equality that ignores spelling."""

import json
from typing import Any


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is anything else (NaN and Infinity are no JSON)."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal for equal values. Types count: 1 is not true, nor is "1" 1."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
