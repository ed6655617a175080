"""Table of the shapes that rows come in: a question and its answer, or a list of messages.

    SHAPES["question_answer"] = PairShape("question", "answer")

To add a shape, add it here (and to the table of docs/data.md): config, form, recognition of files, errors and the fast
path for pairs derive from `SHAPES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.core.errors import BadData


@dataclass(frozen=True)
class PairShape:
    """Rows with the fields of a question and its answer; the optional field `context` is added to the question."""

    question: str
    answer: str
    context: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every row of this shape has."""
        return self.question, self.answer


@dataclass(frozen=True)
class ChatShape:
    """Rows with a list of messages, each with role and content (or `from` and `value`)."""

    messages: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every row of this shape has."""
        return (self.messages,)


RowShape = PairShape | ChatShape
SHAPES: dict[str, RowShape] = {
    "messages": ChatShape("messages"),
    "conversations": ChatShape("conversations"),
    "alpaca": PairShape("instruction", "output", context="input"),
    "prompt_completion": PairShape("prompt", "completion"),
    "question_answer": PairShape("question", "answer"),
    "problem_solution": PairShape("problem", "solution"),
    "prompt_story": PairShape("prompt", "story"),
    "command_json": PairShape("command", "json"),
}


def recognise_shape(values: Iterable[Any], name: str) -> str:
    """The shape that most of `values` have, by their fields; BadData when none has a known one."""
    rows = [value for value in values if isinstance(value, dict)]
    votes = {name: sum(all(field in row for field in shape.fields) for row in rows) for name, shape in SHAPES.items()}
    winner = max(votes, key=lambda name: votes[name])
    if not votes[winner]:
        fields = ", ".join(map(str, rows[0])) if rows else "no JSON object among the first rows"
        shapes = "; ".join("+".join(shape.fields) for shape in SHAPES.values())
        raise BadData(f"{name}: rows of no known shape ({fields}); rename the fields to one of: {shapes}")
    return winner


def missing_field(row: dict[Any, Any], field: str, shape: str) -> str:
    """The reason why a row of a file of `shape` lacks `field`: another shape, another spelling, or neither."""
    other = next((name for name, candidate in SHAPES.items() if row.keys() >= set(candidate.fields)), shape)
    if other != shape:
        return f"missing field {field!r}: this row has the shape {other}, its file {shape}; give each shape a file"
    spelling = next((name for name in row if str(name).strip().lower() == field), None)
    return f"missing field {field!r}" + (f"; it has {spelling!r}: rename it" if spelling is not None else "")
