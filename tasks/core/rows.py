"""The canonical row: chat messages, and which of the assistant's are labels. One JSON object a line."""

import json
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

    `intent` is the answer's `intent` where answers are JSON objects with one. `labels` are the places of the messages
    that are learnt, all of them the assistant's; None is the last message alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[Message]
    intent: str | None = None
    labels: list[int] | None = None

    @model_validator(mode="after")
    def _labels_are_answers(self) -> Self:
        for place in self.labels or ():
            if not 0 <= place < len(self.messages) or self.messages[place].role != "assistant":
                raise ValueError(f"labels: message {place} is none of the assistant's")
        return self

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Every message but the last, as a chat template takes them."""
        return [message.model_dump() for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The last message's content: what a model is asked for."""
        return self.messages[-1].content


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file that the ingest stage wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Row.model_validate_json(line)


def write_rows(path: Path, rows: Iterator[Row] | list[Row]) -> int:
    """Writes rows, one a line, and returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            without = {"labels"} if row.labels is None else None
            file.write(json.dumps(row.model_dump(exclude=without), ensure_ascii=False) + "\n")
            count += 1
    return count
