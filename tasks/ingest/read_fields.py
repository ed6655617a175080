"""Reads the fields of rows, messages and parts of messages beyond their texts, by the table of `row_fields`."""

from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.ingest.exact_json import load
from tasks.ingest.row_fields import Use, is_empty, is_learnt, refuse, shortened, use_of

CONTENT_FIELDS = ("content", "value", "parts")  # parts: Vertex AI
SWITCHES = (Use.SWITCH, Use.OFF_SWITCH)


class RowFields(NamedTuple):
    """A row's fields that are read beside question and answer, by name; `unread` collects those that are not."""

    system: dict[str, Any]
    history: dict[str, Any]
    context: dict[str, Any]
    ignored: Collection[str]
    unread: dict[str, Any]


def read_fields(
    row: dict[str, Any], read: Collection[str], ignored: Collection[str], unread: dict[str, Any]
) -> RowFields:
    """The fields of a row but those of its shape (`read`).

    Raises ValueError for a row that is switched off, and for fields that change what an answer means.
    """
    fields = RowFields({}, {}, {}, ignored, unread)
    by_use = {Use.SYSTEM: fields.system, Use.HISTORY: fields.history, Use.CONTEXT: fields.context}
    for name, value in row.items():
        if name in read or is_empty(value):
            continue
        use = use_of(str(name))
        if use is Use.NOTE or name in ignored:
            unread[name] = value
        elif use in by_use:
            by_use[use][name] = value
        elif use in SWITCHES:
            if not is_learnt(name, value, use):
                raise ValueError(f"the row is switched off by its field {name!r} ({shortened(value)})")
        elif use is Use.PREFERENCE:
            raise ValueError(f"field {name!r} is a preference's, and the rest of the pair is missing")
        else:
            refuse(name, value, use)
    return fields


def read_message_fields(
    message: dict[str, Any], content: str, is_answer: bool, location: str, fields: RowFields
) -> bool:
    """Whether a message may be a label, by its fields beside role and content.

    Raises ValueError for fields that change what the answer means.
    """
    learnt = True
    for name, value in message.items():
        if name in ("role", content) or (name == "from" and "role" not in message):
            continue
        use = use_of(str(name))
        if use in SWITCHES and name not in fields.ignored:
            if is_answer and value is not None:
                learnt = is_learnt(name, value, use, location) and learnt
        elif not is_empty(value):
            if name not in fields.ignored:
                refuse(name, value, use, location)
            fields.unread[f"messages[].{name}"] = value
    return learnt


def read_part_fields(part: dict[str, Any], number: int, fields: RowFields) -> None:
    """Raises ValueError for a part of a message's content that is switched off, or whose fields change its meaning."""
    for name, value in part.items():
        if name in ("type", "text") or is_empty(value):
            continue
        use, location = use_of(str(name)), f" of a part of message {number}"
        if name not in fields.ignored:
            if use in SWITCHES:
                if not is_learnt(name, value, use, location):
                    raise ValueError(
                        f"a part of message {number} is switched off by its field {name!r} ({shortened(value)}); "
                        "only whole messages can be: write the parts as messages, or the weight on the message"
                    )
                continue
            refuse(name, value, use, location)
        fields.unread[f"messages[].content[].{name}"] = value


def refuse_unclear_nulls(messages: list[dict[str, Any]], roles: list[str]) -> None:
    """Raises ValueError where null switches some answers neither on nor off.

    Where all messages or all answers have the field, as tables and libraries write it, null is no value.
    """
    nulls = {name for message in messages if len(message) > 2 for name, value in message.items() if value is None}
    for name in sorted(name for name in nulls if use_of(str(name)) in SWITCHES):
        answers = [message for message, role in zip(messages, roles, strict=True) if role == "assistant"]
        if all(name in message for message in messages) or all(
            name in message and message[name] is None for message in answers
        ):
            continue
        number = next(i for i, message in enumerate(messages, start=1) if name in message and message[name] is None)
        raise ValueError(
            f"field {name!r} of message {number} is null, and other messages have none: that says neither learn it nor "
            "do not; write 1 or 0"
        )


def parsed_cell(value: Any) -> Any:
    """A list or object that a table's cell holds as its JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return load(value.encode())
        except ValueError:
            return value
    return value
