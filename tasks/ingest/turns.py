"""Turns of a chat from a row of any shape. A row that does not fit raises ValueError with what is wrong."""

import json
import re
from typing import Any

import orjson

from tasks.ingest.row_shapes import SHAPES, PairShape, missing_field

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "chatgpt": "assistant", "system": "system"}  # fmt: skip
# Texts that programs write where a value is missing.
PLACEHOLDERS = frozenset(["nan", "NaN", "NAN", "<NA>", "#N/A", "null", "NULL", "undefined", "TODO"])
SHORT = 10  # characters; a shorter text may be one of those, or invisible
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|bos|eos|\|im_start\||\|im_end\||\|eot_id\||\|begin_of_text\||\|endoftext\|"
    r"|\|start_header_id\||\|end_header_id\|)>"
)
CONTROL_BYTES = re.compile(CONTROL.pattern.encode())


Turn = tuple[str, str, bool]
"""A message: its role (`system`, `user` or `assistant`), its text, and whether it may be a label."""


def to_turns(row: Any, shape: str, system_prompt: str | None = None) -> list[Turn]:
    """A row's turns: an optional system one, then user and assistant in turn, the assistant last.

    Raises ValueError with what is missing, empty, not a string or out of order.
    """
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type_name(row)}")
    layout = SHAPES[shape]
    try:
        turns = _of_pair(row, layout) if isinstance(layout, PairShape) else _of_messages(row, layout.messages)
    except KeyError as error:
        raise ValueError(missing_field(row, str(error.args[0]), shape)) from error
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt, False))
    return turns


def _in_order(conversation: list[Turn]) -> list[Turn]:
    """The conversation itself. Raises ValueError where roles do not alternate, or no answer ends it."""
    turns = conversation[1:] if conversation[0][0] == "system" else conversation
    for number, (role, _, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(f"roles out of order: message {number + 1} is {role}'s, not {expected}'s")
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError("roles out of order: the last message is not the assistant's, so there is nothing to learn")
    return conversation


def _of_pair(row: dict[str, Any], shape: PairShape) -> list[Turn]:
    question, answer = row[shape.question], row[shape.answer]
    if isinstance(question, list) and isinstance(answer, list):
        return _in_order(_turns(question + answer))  # TRL's conversational prompt and completion
    prompt = _text(question, shape.question)
    if shape.context and (context := row.get(shape.context)):
        prompt = f"{prompt}\n\n{_text(context, shape.context)}"
    turns = [("user", prompt, False), ("assistant", _answer(answer, shape.answer), True)]
    if system := row.get("system"):
        turns.insert(0, ("system", _text(system, "system"), False))
    return turns


def _of_messages(row: dict[str, Any], field: str) -> list[Turn]:
    turns = _turns(row[field])
    if row.get("system") and turns[0][0] != "system":
        turns.insert(0, ("system", _text(row["system"], "system"), False))
    return _in_order(turns)


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
    content, location = message[field], f" of message {number}"
    if isinstance(content, list):
        content = _text_parts(content, number)
    text = _answer(content, field, location) if ROLES[role] == "assistant" else _text(content, field, location)
    return ROLES[role], text, message.get("weight") != 0


def _text_parts(parts: list[Any], number: int) -> str:
    """The text of content in parts, as multimodal chats have it; ValueError for a part that is no text."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise ValueError(f"message {number} has a part that is no text ({kind}); only text can be learnt")
    return "".join(part["text"] for part in parts)


def _answer(value: Any, field: str, location: str = "") -> str:
    """An answer's text; a JSON object becomes its text."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)  # with the spaces that people write
    return _text(value, field, location)


def _text(text: Any, field: str, location: str = "") -> str:
    if not isinstance(text, str):
        raise ValueError(f"field {field!r}{location} is not a string but {type_name(text)}")
    if not text or text.isspace():
        raise ValueError(f"empty field {field!r}{location}")
    if len(text) < SHORT:
        if text in PLACEHOLDERS:
            raise ValueError(f"field {field!r}{location} is {text!r}, which programs write where a value is missing")
        if not text.strip().strip(INVISIBLE):
            raise ValueError(f"empty field {field!r}{location}: its characters are invisible")
    if "\0" in text or "\ufffd" in text:
        character = (
            "a NUL character" if "\0" in text else "U+FFFD, left of a character that was read in a wrong encoding"
        )
        raise ValueError(f"field {field!r}{location} holds {character}; take it from the source again")
    return text


def refuse_control_tokens(turns: list[Turn]) -> None:
    """Raises ValueError for text that holds a chat template's own tokens."""
    for number, (_, text, _) in enumerate(turns, start=1):
        if match := CONTROL.search(text):
            raise ValueError(
                f"message {number} holds the control token {match[0]}: take it out, the model's template writes it"
            )


def type_name(value: Any) -> str:
    """The type of a JSON value, in words."""
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
