"""The shapes that rows come in, and how each becomes turns of a chat. A row that does not fit raises ValueError."""

import json
import re
from collections.abc import Iterable
from typing import Any

import orjson

from tasks.core.errors import BadData

# Shape -> fields of the question (one, or two of which the second may be missing), then the field of the answer.
FLAT: dict[str, tuple[tuple[str, ...], str]] = {
    "alpaca": (("instruction", "input"), "output"),
    "prompt_completion": (("prompt",), "completion"),
    "question_answer": (("question",), "answer"),
    "problem_solution": (("problem",), "solution"),
    "prompt_story": (("prompt",), "story"),
    "command_json": (("command",), "json"),
}
LISTS = {"messages": "messages", "conversations": "conversations"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "chatgpt": "assistant", "system": "system"}  # fmt: skip
# What programs write where a value is missing.
MISSING = frozenset(["nan", "NaN", "NAN", "<NA>", "#N/A", "null", "NULL", "undefined", "TODO"])
SHORT = 10  # characters below which a text may be one of those, or nothing that can be seen
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|bos|eos|\|im_start\||\|im_end\||\|eot_id\||\|begin_of_text\||\|endoftext\|"
    r"|\|start_header_id\||\|end_header_id\|)>"
)
CONTROL_BYTES = re.compile(CONTROL.pattern.encode())


# A message: its role (`system`, `user` or `assistant`), its text, and whether it may be a label.
Turn = tuple[str, str, bool]


def recognise(values: Iterable[Any], name: str) -> str:
    """The shape that most of `values` have, by their fields; BadData when none has a known one."""
    rows = [value for value in values if isinstance(value, dict)]
    votes = {shape: sum(field in row for row in rows) for shape, field in LISTS.items()}
    for shape, (question, answer) in FLAT.items():
        votes[shape] = sum(question[0] in row and answer in row for row in rows)
    shape = max(votes, key=lambda shape: votes[shape])
    if not votes[shape]:
        fields = ", ".join(map(str, rows[0])) if rows else "no JSON object among the first rows"
        raise BadData(f"{name}: rows of no known shape ({fields}); rename the fields to one of: {_known()}")
    return shape


def _known() -> str:
    return "; ".join([*LISTS, *(f"{question[0]}+{answer}" for question, answer in FLAT.values())])


def to_turns(value: Any, shape: str, system_prompt: str | None = None) -> list[Turn]:
    """A row's turns: an optional system one, then user and assistant in turn, the assistant last.

    Raises ValueError with what is missing, empty, not a string or out of order.
    """
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type_name(value)}")
    try:
        turns = _listed(value, LISTS[shape]) if shape in LISTS else _flat(value, *FLAT[shape])
    except KeyError as error:
        raise ValueError(_missing(value, str(error.args[0]), shape)) from error
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt, False))
    return turns


def _missing(value: dict[Any, Any], field: str, shape: str) -> str:
    other = next((other for other, (question, answer) in FLAT.items() if {question[0], answer} <= value.keys()), None)
    other = other or next((other for other, field in LISTS.items() if field in value), None)
    if other and other != shape:
        return f"missing field {field!r}: this row has the shape {other}, its file {shape}; give each shape a file"
    near = next((name for name in value if str(name).strip().lower() == field), None)
    return f"missing field {field!r}" + (f"; it has {near!r}: rename it" if near is not None else "")


def _ordered(whole: list[Turn]) -> list[Turn]:
    turns = whole[1:] if whole[0][0] == "system" else whole
    for number, (role, _, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(f"roles out of order: message {number + 1} is {role}'s, not {expected}'s")
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError("roles out of order: the last message is not the assistant's, so there is nothing to learn")
    return whole


def _flat(value: dict[str, Any], question: tuple[str, ...], answer: str) -> list[Turn]:
    first, last = value[question[0]], value[answer]
    if isinstance(first, list) and isinstance(last, list):
        return _ordered(_turns(first + last))  # TRL's conversational prompt and completion
    asked = _text(first, question[0])
    for field in question[1:]:
        if more := value.get(field):
            asked = f"{asked}\n\n{_text(more, field)}"
    turns = [("user", asked, False), ("assistant", _answer(last, answer), True)]
    if system := value.get("system"):
        turns.insert(0, ("system", _text(system, "system"), False))
    return turns


def _listed(value: dict[str, Any], field: str) -> list[Turn]:
    turns = _turns(value[field])
    if value.get("system") and turns[0][0] != "system":
        turns.insert(0, ("system", _text(value["system"], "system"), False))
    return _ordered(turns)


def _turns(messages: Any) -> list[Turn]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a table's cell holds a list as its text
        try:
            messages = orjson.loads(messages)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"messages are text, and not JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with a message or more, and are {type_name(messages)}")
    return [_turn(message, number) for number, message in enumerate(messages, start=1)]


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is not an object but {type_name(message)}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; roles are user, assistant, system")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"message {number} calls a tool: only text can be learnt; write the call as the content")
    field = "content" if "content" in message else "value"
    if field not in message:
        raise ValueError(f"message {number} has no content")
    content, place = message[field], f" of message {number}"
    if isinstance(content, list):
        content = _joined(content, number)
    text = _answer(content, field, place) if ROLES[role] == "assistant" else _text(content, field, place)
    return ROLES[role], text, message.get("weight") != 0


def _joined(parts: list[Any], number: int) -> str:
    """Content in parts, as multimodal chats have it: text parts in a row."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise ValueError(f"message {number} has a part that is no text ({kind}); only text can be learnt")
    return "".join(part["text"] for part in parts)


def _answer(value: Any, field: str, place: str = "") -> str:
    """An answer may be a JSON object as it is: it is learnt as its text."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)  # with the spaces that people write
    return _text(value, field, place)


def _text(text: Any, field: str, place: str = "") -> str:
    if not isinstance(text, str):
        raise ValueError(f"field {field!r}{place} is not a string but {type_name(text)}")
    if not text or text.isspace():
        raise ValueError(f"empty field {field!r}{place}")
    if len(text) < SHORT:
        if text in MISSING:
            raise ValueError(f"field {field!r}{place} is {text!r}, which programs write where a value is missing")
        if not text.strip().strip(INVISIBLE):
            raise ValueError(f"empty field {field!r}{place}: its characters are invisible")
    if "\0" in text or "\ufffd" in text:
        what = "a NUL character" if "\0" in text else "U+FFFD, left of a character that was read in a wrong encoding"
        raise ValueError(f"field {field!r}{place} holds {what}; take it from the source again")
    return text


def refuse_control_tokens(turns: list[Turn]) -> None:
    """Raises ValueError for text that holds a chat template's own tokens."""
    for number, (_, text, _) in enumerate(turns, start=1):
        if found := CONTROL.search(text):
            raise ValueError(
                f"message {number} holds the control token {found[0]}: take it out, the model's template writes it"
            )


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, float) and value != value:
        return "NaN"
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
        str: "a string",
        bytes: "binary data",
    }
    if value == []:
        return "an empty list"
    return names.get(type(value), f"a {type(value).__name__}")
