"""Table of the shapes that rows come in: a question and its answer, or a list of messages.

    SHAPES["question_answer"] = PairShape("question", "answer")

To add a shape, add it here (and to the table of docs/data.md): config, form, recognition of files, errors and the fast
path for pairs derive from `SHAPES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def names(self) -> frozenset[str]:
        """All fields that are read by this shape."""
        return frozenset(filter(None, (self.question, self.answer, self.context)))


@dataclass(frozen=True)
class ChatShape:
    """Rows with a list of messages, each with role and content (or `from` and `value`)."""

    messages: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every row of this shape has."""
        return (self.messages,)

    @cached_property
    def names(self) -> frozenset[str]:
        """All fields that are read by this shape."""
        return frozenset(self.fields)


@dataclass(frozen=True)
class PreferenceShape:
    """Rows of a better and a worse answer; rows of any other shape can be preference rows, too."""

    fields: tuple[str, ...] = ("chosen", "rejected")

    @cached_property
    def names(self) -> frozenset[str]:
        """All fields that are read by this shape."""
        return frozenset(self.fields)


RowShape = PairShape | ChatShape | PreferenceShape
SHAPES: dict[str, RowShape] = {
    "messages": ChatShape("messages"),
    "conversations": ChatShape("conversations"),
    "contents": ChatShape("contents"),
    "alpaca": PairShape("instruction", "output", context="input"),
    "prompt_completion": PairShape("prompt", "completion"),
    "dolly": PairShape("instruction", "response", context="context"),
    "question_answer": PairShape("question", "answer", context="context"),
    "question_response": PairShape("question", "response"),
    "query_response": PairShape("query", "response"),
    "squad": PairShape("question", "answers", context="context"),
    "problem_solution": PairShape("problem", "solution"),
    "prompt_story": PairShape("prompt", "story"),
    "command_json": PairShape("command", "json"),
    "preference": PreferenceShape(),
}
FOREIGN_FORMATS = (
    ({"custom_id", "response"}, "OpenAI batch output", "it has answers without their questions: take the messages of "
     "the batch's input with the same custom_id, and add the answer as the assistant's message"),
    ({"custom_id", "body"}, "OpenAI batch input", "it has requests: write each body's messages as a row, with the "
     "answer as the last message"),
    ({"data", "annotations"}, "Label Studio's export", "write data's text as question and the annotation as answer"),
    ({"annotation_id"}, "Label Studio's JSON-MIN", "write the text as question and the annotation as answer"),
    ({"text", "label"}, "a classification or doccano file", "write the text as question and the label as answer"),
    ({"text", "labels"}, "a classification or doccano file", "write the text as question and the labels as answer"),
    ({"text", "entities"}, "doccano's export", "write the text as question and the entities as answer, as JSON"),
    ({"paragraphs"}, "SQuAD's nested file", "write a row with question, context and answers for each of its qas"),
    ({"segments"}, "axolotl's input_output", "write the segments as messages, and weight 0 on answers without label"),
    ({"conversation"}, "ms-swift's or XTuner's conversation", "write messages with role and content"),
    ({"input_ids"}, "tokenised rows", "give the texts that were tokenised"),
    ({"input", "preferred_output"}, "OpenAI's preference file", "write prompt, chosen and rejected"),
    ({"text"}, "plain text", "it has no questions and answers: write them as two fields"),
)  # fmt: skip
"""Fields by which rows of other tools are recognised that are not read, the tool, and the remedy."""


def recognise_shape(values: Iterable[Any], name: str) -> str:
    """The shape that most of `values` have, by their fields; BadData when none has a known one."""
    rows = [value for value in values if isinstance(value, dict)]
    votes = {name: sum(all(field in row for field in shape.fields) for row in rows) for name, shape in SHAPES.items()}
    winner = max(votes, key=lambda name: votes[name])
    if not votes[winner]:
        _refuse_foreign_format(rows, name)
        fields = ", ".join(map(str, rows[0])) if rows else "no JSON object among the first rows"
        shapes = "; ".join("+".join(shape.fields) for shape in SHAPES.values())
        raise BadData(f"{name}: rows of no known shape ({fields}); rename the fields to one of: {shapes}")
    return winner


def _refuse_foreign_format(rows: list[dict[Any, Any]], name: str) -> None:
    """Raises BadData that names the format, where the rows are those of a tool that is known and not read."""
    for row in rows[:1]:
        for fields, tool, remedy in FOREIGN_FORMATS:
            if row.keys() >= fields:
                raise BadData(f"{name}: this is {tool} ({', '.join(map(str, row))}); {remedy}")
        if any(str(field).endswith(".responses") for field in row):
            names = ", ".join(map(str, row))
            remedy = "write the submitted response as the answer, beside its question"
            raise BadData(f"{name}: this is Argilla's export ({names}); {remedy}")


def missing_field(row: dict[Any, Any], field: str, shape: str) -> str:
    """The reason why a row of a file of `shape` lacks `field`: another shape, another spelling, or neither."""
    other = next((name for name, candidate in SHAPES.items() if row.keys() >= set(candidate.fields)), shape)
    if other != shape:
        return f"missing field {field!r}: this row has the shape {other}, its file {shape}; give each shape a file"
    spelling = next((name for name in row if str(name).strip().lower() == field), None)
    return f"missing field {field!r}" + (f"; it has {spelling!r}: rename it" if spelling is not None else "")
