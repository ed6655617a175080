"""Preference rows: a better and a worse answer, or an answer that is marked good or bad, for a stage that learns them.

    {"prompt": [...], "chosen": [...], "rejected": [...]}    {"prompt": [...], "completion": [...], "label": false}

Messages have role and content, as TRL's DPO and KTO trainers take them.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import orjson

from tasks.ingest.canonical import canonical
from tasks.ingest.read_fields import RowFields, parsed_cell, read_fields
from tasks.ingest.row_fields import is_empty
from tasks.ingest.row_shapes import SHAPES, ChatShape, PairShape
from tasks.ingest.turns import (
    Turn,
    chat_turns,
    history_turns,
    question_text,
    refuse_control_tokens,
    to_messages,
    to_turns,
    type_name,
    with_system,
)

CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
KTO_LABELS = ("label", "kto_tag")
KTO_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
MESSAGE_LISTS = tuple(shape.messages for shape in SHAPES.values() if isinstance(shape, ChatShape))


class PreferenceRow(NamedTuple):
    """A line of preference.jsonl, and the hash of its question, equal to that of a row of any split."""

    line: bytes
    question: bytes


def preference_row(
    row: dict[str, Any], shape: str, system_prompt: str | None, salt: bytes, ignored: Collection[str],
    unread: dict[str, Any],
) -> PreferenceRow | None:  # fmt: skip
    """The row as a preference; None where it is none. Raises ValueError where a part of the preference is missing."""
    chosen, rejected = _field(row, CHOSEN, ignored), _field(row, REJECTED, ignored)
    if chosen or rejected:
        return _pair(row, chosen, rejected, system_prompt, salt, ignored, unread)
    layout = SHAPES[shape]
    if isinstance(layout, PairShape) and layout.context == "input" and _is_ranked(row.get(layout.answer)):
        better, worse = row[layout.answer]
        rest = {name: value for name, value in row.items() if name != layout.answer}
        ranked = {**rest, "chosen": better, "rejected": worse}
        return _pair(ranked, "chosen", "rejected", system_prompt, salt, ignored, unread)
    label = _field(row, KTO_LABELS, ignored)
    verdict = KTO_VALUES.get(str(row[label]).strip().lower()) if label else None
    if label is None or verdict is None or any(name not in row for name in layout.fields):
        return None
    rest = {name: value for name, value in row.items() if name != label}
    *prompt, answer = to_turns(rest, shape, system_prompt, ignored, unread)
    return _preference(prompt, {"completion": answer}, salt, {"label": verdict})


def _field(row: dict[str, Any], names: tuple[str, ...], ignored: Collection[str]) -> str | None:
    """The first of these fields that the row has a value for."""
    return next((name for name in names if name in row and not is_empty(row[name]) and name not in ignored), None)


def _is_ranked(answers: Any) -> bool:
    """Whether an Alpaca row's answers are LLaMA-Factory's list of a better and a worse one."""
    return isinstance(answers, list) and len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def _pair(
    row: dict[str, Any], chosen: str | None, rejected: str | None, system_prompt: str | None, salt: bytes,
    ignored: Collection[str], unread: dict[str, Any],
) -> PreferenceRow:  # fmt: skip
    if rejected is None:
        raise ValueError(f"a preference row: field {chosen!r} without {REJECTED[0]!r}; take {chosen!r} as the answer")
    prompt_name = next((name for name in MESSAGE_LISTS if not is_empty(row.get(name))), None)
    pair = None if prompt_name else _pair_shape(row)
    names = {chosen, rejected, prompt_name, *(pair.names if pair else ())}
    if pair and chosen:
        names -= {pair.answer} - {chosen, rejected}  # ms-swift alone has the better answer in the shape's own field
    fields = read_fields(row, {name for name in names if name}, ignored, unread)
    prompt = _prompt(row, prompt_name, pair, fields)
    better = _messages(row[chosen], fields) if chosen else None
    if better is None and pair and pair.answer in row:
        better = _messages(row[pair.answer], fields)
    worse = _messages(row[rejected], fields)
    if better is None:
        if not prompt or prompt[-1][0] != "assistant":
            raise ValueError(f"a preference row: field {rejected!r} without {CHOSEN[0]!r}")
        *prompt, last = prompt
        better = [last]
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared][:2] == worse[shared][:2]:
        shared += 1
    if shared:
        prompt = _merged(prompt, better[:shared])
        better, worse = better[shared:], worse[shared:]
    if not prompt:
        raise ValueError("a preference row without its prompt: give the question in a field prompt")
    if len(better) != 1 or len(worse) != 1 or (better[0][0], worse[0][0]) != ("assistant", "assistant"):
        raise ValueError("a preference row: chosen and rejected must differ in one answer of the assistant's, the last")
    if system_prompt and prompt[0][0] != "system":
        prompt.insert(0, ("system", system_prompt, False))
    return _preference(prompt, {"chosen": better[0], "rejected": worse[0]}, salt, {})


def _merged(prompt: list[Turn], opening: list[Turn]) -> list[Turn]:
    """The prompt that both answers' messages begin with; ValueError where the row's own prompt is another one."""
    system, rest = (prompt[:1], prompt[1:]) if prompt and prompt[0][0] == "system" else ([], prompt)
    if system and opening[0][0] != "system":
        opening = [*system, *opening]
    if [turn[:2] for turn in opening[len(opening) - len(rest) :]] != [turn[:2] for turn in rest]:
        raise ValueError("a preference row: both answers' messages begin with another prompt than the row's")
    return opening


def _pair_shape(row: dict[str, Any]) -> PairShape | None:
    """The pair shape whose question the row has."""
    pairs = [
        shape for shape in SHAPES.values() if isinstance(shape, PairShape) and not is_empty(row.get(shape.question))
    ]
    return next((shape for shape in pairs if shape.answer in row), pairs[0] if pairs else None)


def _prompt(row: dict[str, Any], name: str | None, pair: PairShape | None, fields: RowFields) -> list[Turn]:
    """The turns before the two answers; none where the answers' own messages hold them."""
    if name:
        return chat_turns(row[name], fields)
    if pair is None:
        return []
    question = parsed_cell(row[pair.question])
    if isinstance(question, list):
        return chat_turns(question, fields)
    turns: list[Turn] = [*history_turns(fields), ("user", question_text(row, pair, fields), False)]
    return with_system(turns, fields)


def _messages(value: Any, fields: RowFields) -> list[Turn]:
    """An answer as messages: a text, a message, or a list of messages."""
    value = parsed_cell(value)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        return to_messages(value, fields)
    if isinstance(value, str):
        return to_messages([{"role": "assistant", "content": value}], fields)
    raise ValueError(f"a preference row: an answer is not a text but {type_name(value)}")


def _preference(prompt: list[Turn], answers: dict[str, Turn], salt: bytes, fields: dict[str, Any]) -> PreferenceRow:
    """The row's line. Raises ValueError for a prompt that does not end with the user, and for control tokens."""
    turns = prompt[1:] if prompt[0][0] == "system" else prompt
    in_turn = all(role == ("user", "assistant")[i % 2] for i, (role, _, _) in enumerate(turns))
    if not in_turn or not len(turns) % 2:
        raise ValueError("a preference row: the prompt's roles must be user and assistant in turn, the user last")
    for answer in answers.values():
        refuse_control_tokens([*prompt, answer])
    value = {"prompt": [_message(turn) for turn in prompt]} | {name: [_message(a)] for name, a in answers.items()}
    question = canonical([*prompt, ("assistant", next(iter(answers.values()))[1], True)], salt, learn_all=False)[1]
    return PreferenceRow(orjson.dumps(value | fields) + b"\n", question)


def _message(turn: Turn) -> dict[str, str]:
    return {"role": turn[0], "content": turn[1]}
