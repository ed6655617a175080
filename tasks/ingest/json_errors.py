"""Why a line is not JSON, in words that name the remedy; called only for lines that cannot be parsed."""

import json
from typing import Any


def json_error_reason(line: bytes) -> str:
    """The reason, with the position where it is known."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1} of the line; save the file as UTF-8"
    if "\0" in text:
        return "not JSON: NUL bytes, as a file has that was only half written; write it again"
    constants: list[str] = []

    def record_constant(name: str) -> str:
        constants.append(name)
        return name

    try:
        value = json.loads(text, parse_constant=record_constant, parse_int=float)  # int() refuses 4300 digits
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    except json.JSONDecodeError as error:
        return _syntax_reason(text, error)
    if constants:
        return f"not JSON: {constants[0]}{_field_of(value, constants[0])}; write null, or take the row away"
    return (
        "not JSON: half of a surrogate pair (\\ud800 to \\udfff), a character cut in two; take it from the source again"
    )


def _syntax_reason(text: str, error: json.JSONDecodeError) -> str:
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


def _field_of(value: Any, constant: str) -> str:
    """` in field 'x'` for the field of an object that has this value; else empty."""
    fields = value.items() if isinstance(value, dict) else ()
    return next((f" in field {field!r}" for field, content in fields if content == constant), "")
