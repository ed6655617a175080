"""Turns of a chat from a row of any shape. A row that does not fit raises ValueError with what is wrong."""

import re
from collections.abc import Collection
from typing import Any

from tasks.ingest.exact_json import Number, dump, load
from tasks.ingest.read_fields import (
    CONTENT_FIELDS,
    RowFields,
    parsed_cell,
    read_fields,
    read_message_fields,
    read_part_fields,
    refuse_unclear_nulls,
)
from tasks.ingest.row_shapes import SHAPES, ChatShape, PairShape, missing_field

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
BEHIND_LAST_LABEL = "messages[] behind the last answer that is learnt"
CONTROL_BYTES = re.compile(CONTROL.pattern.encode())


Turn = tuple[str, str, bool]
"""A message: its role (`system`, `user` or `assistant`), its text, and whether it may be a label."""


def to_turns(
    row: Any,
    shape: str,
    system_prompt: str | None = None,
    ignored: Collection[str] = (),
    unread: dict[str, Any] | None = None,
) -> list[Turn]:
    """A row's turns: an optional system one, then user and assistant in turn, the assistant last.

    Puts fields that are not read into `unread`, with their values. Raises ValueError with what is missing, empty, not
    a string or out of order, and for fields that change what an answer means, unless they are `ignored`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type_name(row)}")
    layout = SHAPES[shape]
    try:
        if any(name not in row for name in layout.fields):
            raise KeyError(next(name for name in layout.fields if name not in row))
        fields = read_fields(row, layout.names, ignored, {} if unread is None else unread)
        if isinstance(layout, PairShape):
            turns = _of_pair(row, layout, fields)
        elif isinstance(layout, ChatShape):
            turns = _of_messages(row[layout.messages], fields)
        else:
            raise ValueError("a preference row: it has no answer of its own")
    except KeyError as error:
        raise ValueError(missing_field(row, str(error.args[0]), shape)) from error
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt, False))
    return turns


def in_order(conversation: list[Turn]) -> list[Turn]:
    """The conversation itself. Raises ValueError where roles do not alternate, or no answer ends it."""
    turns = conversation[1:] if conversation[0][0] == "system" else conversation
    first = 1 + len(conversation) - len(turns)
    for number, (role, _, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(f"roles out of order: message {first + number} is {role}'s, not {expected}'s")
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError("roles out of order: the last message is not the assistant's, so there is nothing to learn")
    return conversation


def _of_pair(row: dict[str, Any], shape: PairShape, fields: RowFields) -> list[Turn]:
    question, answer = row[shape.question], row[shape.answer]
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational prompt and completion
        return _of_messages(question + answer, fields)
    turns = [*history_turns(fields), ("user", question_text(row, shape, fields), False)]
    turns.append(("assistant", _answer(one_answer(answer, shape.answer), shape.answer), True))
    return with_system(turns, fields)


def question_text(row: dict[str, Any], shape: PairShape, fields: RowFields) -> str:
    """The question of a pair, and below it what belongs to it (`input`, `context`)."""
    texts = [_text(row[shape.question], shape.question)]
    if shape.context and (context := row.get(shape.context)):
        texts.append(_text(context, shape.context))
    texts += [_text(value, name) for name, value in fields.context.items()]
    return "\n\n".join(texts)


def _of_messages(messages: Any, fields: RowFields) -> list[Turn]:
    return in_order(chat_turns(messages, fields))


def chat_turns(messages: Any, fields: RowFields) -> list[Turn]:
    """The messages' turns with the row's own system message. Raises ValueError for a context or a history beside."""
    for name in (*fields.context, *fields.history):
        raise ValueError(f"field {name!r} stands beside messages: write it into them, or name it in ignore_fields")
    return with_system(to_messages(messages, fields), fields)


def with_system(turns: list[Turn], fields: RowFields) -> list[Turn]:
    """The turns with the row's own system message in front. Raises ValueError where there are two different ones."""
    for name, value in fields.system.items():
        text = _text(_plain_parts(value), name)
        if turns[0][0] != "system":
            turns.insert(0, ("system", text, False))
        elif turns[0][1] != text:
            raise ValueError(f"two system messages: field {name!r} says another one than the row has; keep one of them")
    return turns


def _plain_parts(value: Any) -> Any:
    """The text of parts, as Bedrock ([{"text": ...}]) and Vertex AI ({"parts": [{"text": ...}]}) write it."""
    parts = value.get("parts") if isinstance(value, dict) else value
    if isinstance(parts, list) and parts and all(isinstance(part, dict) and set(part) == {"text"} for part in parts):
        return "".join(map(str, (part["text"] for part in parts)))
    return value


def up_to_last_label(turns: list[Turn], unread: dict[str, Any]) -> list[Turn]:
    """The turns without those behind the last that may be a label: nothing of them is learnt, asked or scored."""
    end = max((i for i, turn in enumerate(turns, start=1) if turn[2] and turn[0] == "assistant"), default=len(turns))
    if end < len(turns):
        unread[BEHIND_LAST_LABEL] = turns[end][1]
    return turns[:end]


def history_turns(fields: RowFields) -> list[Turn]:
    """Turns before the question: [question, answer] pairs (LLaMA-Factory, ms-swift), or messages."""
    turns: list[Turn] = []
    for name, value in fields.history.items():
        pairs = parsed_cell(value)
        if not isinstance(pairs, list):
            raise ValueError(f"field {name!r} is not a list of [question, answer] but {type_name(value)}")
        if all(isinstance(pair, dict) for pair in pairs):
            return in_order(to_messages(pairs, fields))
        for number, pair in enumerate(pairs, start=1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"field {name!r}: turn {number} is not a list of a question and an answer")
            turns.append(("user", _text(pair[0], name, f", turn {number}"), False))
            turns.append(("assistant", _answer(pair[1], name, f", turn {number}"), True))
    return turns


def one_answer(value: Any, field: str) -> Any:
    """The only answer of a SQuAD row ({"text": [...]}) or of Argilla's annotators ([{"value": ...}]); else `value`.

    Raises ValueError where there are several different ones, or none.
    """
    answers: list[Any] | None = None
    if field == "answers":
        answers = value.get("text") if isinstance(value, dict) else value
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "value" in item for item in value):
        answers = [item["value"] for item in value if item.get("status", "submitted") == "submitted"]
    if not isinstance(answers, list):
        return value
    different = list(dict.fromkeys(map(str, answers)))
    if len(different) != 1:
        raise ValueError(f"field {field!r} holds {len(different)} different answers; keep the one that is to be learnt")
    return answers[0]


def to_messages(messages: Any, fields: RowFields) -> list[Turn]:
    """The turns of a list of messages, in their own order. Raises ValueError for a message that is none."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a table's cell holds a list as its text
        try:
            messages = load(messages.encode())
        except ValueError as error:
            raise ValueError(f"messages are text, and not JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with a message or more, and are {type_name(messages)}")
    turns = [_turn(message, number, fields) for number, message in enumerate(messages, start=1)]
    refuse_unclear_nulls(messages, [turn[0] for turn in turns])
    return turns


def _turn(message: Any, number: int, fields: RowFields) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is not an object but {type_name(message)}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; roles are user, assistant, system")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"message {number} calls a tool: only text can be learnt; write the call as the content")
    field = next((name for name in CONTENT_FIELDS if name in message), None)
    if field is None:
        raise ValueError(f"message {number} has no content")
    content, location, role = message[field], f" of message {number}", ROLES[role]
    may_learn = len(message) == 2 or read_message_fields(message, field, role == "assistant", location, fields)
    if isinstance(content, list):
        content = _text_parts(content, number, fields)
    text = _answer(content, field, location) if role == "assistant" else _text(content, field, location)
    return role, text, may_learn


def _text_parts(parts: list[Any], number: int, fields: RowFields) -> str:
    """The text of content in parts, as multimodal chats have it; ValueError for a part that is no text."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", next(iter(part), "")) if isinstance(part, dict) else type_name(part)
            raise ValueError(f"message {number} has a part that is no text ({kind}); only text can be learnt")
        if len(part) > 1 + ("type" in part):
            read_part_fields(part, number, fields)
    return "".join(part["text"] for part in parts)


def _answer(value: Any, field: str, location: str = "") -> str:
    """An answer's text; a JSON object becomes its text."""
    if isinstance(value, dict):
        return dump(value)
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


TYPE_NAMES: dict[type, str] = {
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    Number: "a number",
    type(None): "null",
    str: "a string",
    bytes: "binary data",
}


def type_name(value: Any) -> str:
    """The type of a JSON value, in words."""
    name = TYPE_NAMES.get(type(value))
    if name is not None:
        return name
    if type(value) is list:
        return "a list" if value else "an empty list"
    if isinstance(value, float):
        return "a number" if value == value else "NaN"
    return f"a {type(value).__name__}"
