"""Why a line is not JSON, in words that say what to do: asked only of the lines that orjson refused."""

import json
from typing import Any


def what_is_wrong(line: bytes) -> str:
    """The reason, with the place where it can be told."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        byte, at = line[error.start], error.start + 1
        return f"not UTF-8: byte 0x{byte:02x} at byte {at} of the line; save the file as UTF-8"
    if "\0" in text:
        return "not JSON: NUL bytes, as a file has that was only half written; write it again"
    found: list[str] = []

    def constant(name: str) -> str:
        found.append(name)
        return name

    try:
        value = json.loads(text, parse_constant=constant)
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    except json.JSONDecodeError as error:
        return _not_json(text, error)
    if found:
        return f"not JSON: {found[0]}{_where(value, found[0])}; write null, or take the row away"
    return (
        "not JSON: half of a surrogate pair (\\ud800 to \\udfff), a character cut in two; take it from the source again"
    )


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    if text[: error.pos].rstrip().endswith(",") and text[error.pos :].lstrip().startswith(("}", "]")):
        return f"not JSON: a comma before the closing bracket at character {error.pos + 1}; take it out"
    if error.pos >= len(text) or "Unterminated string" in error.msg:
        return f"not JSON: the row ends too early ({error.msg}); was the file cut, or the row written on several lines?"
    if error.msg == "Extra data":
        return f"not JSON: more behind its end at character {error.pos + 1}; write one object a line"
    if text.startswith("{'") or text.startswith("{u'"):
        return "not JSON but a Python dict; write it with json.dumps"
    if "control character" in error.msg:
        return f"not JSON: an unescaped control character at character {error.pos + 1}; write \\n or \\t"
    return f"not JSON: {error.msg} at character {error.pos + 1}"


def _where(value: Any, name: str) -> str:
    if isinstance(value, dict):
        for field, one in value.items():
            if one == name:
                return f" in field {field!r}"
    return ""
