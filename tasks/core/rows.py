"""Canonical dataset row: chat messages, and which of the assistant's are labels. One JSON object a line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Message(BaseModel):
    """One turn; `role` is `system`, `user` or `assistant`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class Row(BaseModel):
    """A training or held-out example.

    `intent` is the answer's `intent` where answers are JSON objects with one. `labels` are the indices of the messages
    with training labels, all of them the assistant's; None is the last message alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[Message]
    intent: str | None = None
    labels: list[int] | None = None

    @model_validator(mode="after")
    def _labels_are_answers(self) -> Self:
        for index in self.labels or ():
            if not 0 <= index < len(self.messages) or self.messages[index].role != "assistant":
                raise ValueError(f"labels: message {index} is none of the assistant's")
        return self

    @property
    def _answer_index(self) -> int:
        return max(self.labels) if self.labels else len(self.messages) - 1

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Every message before the answer, as a chat template takes them."""
        return [message.model_dump() for message in self.messages[: self._answer_index]]

    @property
    def question(self) -> str:
        """The content of the message before the answer."""
        return self.messages[self._answer_index - 1].content

    @property
    def answer(self) -> str:
        """The content of the last message with labels: the answer that a model should give."""
        return self.messages[self._answer_index].content

    def up_to_answer(self) -> "Row":
        """The row without messages behind the answer, which alone has labels."""
        return self.model_copy(update={"messages": self.messages[: self._answer_index + 1], "labels": None})


def read_rows(path: Path) -> Iterator[Row]:
    """Reads the rows of a file that the ingest stage wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Row.model_validate_json(line)
