"""The shapes that rows come in, and how each becomes chat messages. A row that does not fit raises ValueError."""

import json
from collections.abc import Iterable
from typing import Any

from tasks.core.errors import BadData
from tasks.core.rows import Message

# Shape -> fields of the question, in order, then the field of the answer. The first field must be there.
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
         "bot": "assistant", "system": "system"}  # fmt: skip


def recognise(values: Iterable[Any], name: str) -> str:
    """The shape that most of `values` have, by their fields; BadData when none has a known one."""
    rows = [value for value in values if isinstance(value, dict)]
    votes = {shape: sum(field in row for row in rows) for shape, field in LISTS.items()}
    for shape, (question, answer) in FLAT.items():
        votes[shape] = sum(question[0] in row and answer in row for row in rows)
    shape = max(votes, key=lambda shape: votes[shape])
    if not votes[shape]:
        fields = ", ".join(rows[0]) if rows else "no JSON object among the first rows"
        raise BadData(f"{name}: rows of no known shape ({fields}); rename the fields to one of: {_known()}")
    return shape


def _known() -> str:
    return "; ".join([*LISTS, *(f"{question[0]}+{answer}" for question, answer in FLAT.values())])


def to_messages(value: Any, shape: str, system_prompt: str | None = None) -> list[Message]:
    """A row's messages: an optional system one, then user and assistant in turn, the assistant last.

    Raises ValueError with what is missing, empty, not a string or out of order.
    """
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {_type(value)}")
    messages = _listed(value, LISTS[shape]) if shape in LISTS else _flat(value, *FLAT[shape])
    if messages[0].role != "system" and system_prompt:
        messages.insert(0, Message(role="system", content=system_prompt))
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise ValueError(f"roles out of order: message {number + 1} is {message.role}'s, not {expected}'s")
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError("roles out of order: the last message is not the assistant's, so there is nothing to learn")
    return messages


def _flat(value: dict[str, Any], question: tuple[str, ...], answer: str) -> list[Message]:
    if isinstance(value.get(question[0]), list) and isinstance(value.get(answer), list):
        return _turns(value[question[0]] + value[answer])  # TRL's conversational prompt and completion
    parts = [_text(value, question[0])]
    parts += [_text(value, field) for field in question[1:] if value.get(field) not in (None, "")]
    messages = [
        Message(role="user", content="\n\n".join(parts)),
        Message(role="assistant", content=_answer(value, answer)),
    ]
    if value.get("system") not in (None, ""):
        messages.insert(0, Message(role="system", content=_text(value, "system")))
    return messages


def _listed(value: dict[str, Any], field: str) -> list[Message]:
    if field not in value:
        raise ValueError(f"missing field {field!r}")
    messages = _turns(value[field])
    if value.get("system") not in (None, "") and messages[0].role != "system":
        messages.insert(0, Message(role="system", content=_text(value, "system")))
    return messages


def _turns(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages must be a list with a message or more, and are {_type(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"message {number} is not an object but {_type(turn)}")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} has the unknown role {role!r}; roles are user, assistant, system")
        field = "content" if "content" in turn else "value"
        text = _answer(turn, field) if ROLES[role] == "assistant" else _text(turn, field)
        messages.append(Message(role=ROLES[role], content=text))
    return messages


def _answer(value: dict[str, Any], field: str) -> str:
    """An answer may be a JSON object as it is: it is learnt as its compact text."""
    if isinstance(value.get(field), dict):
        return json.dumps(value[field], ensure_ascii=False)
    return _text(value, field)


def _text(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise ValueError(f"missing field {field!r}")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is not a string but {_type(text)}")
    if not text.strip():
        raise ValueError(f"empty field {field!r}")
    return text


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "a string")
