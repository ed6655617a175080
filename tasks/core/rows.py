"""The canonical row: chat messages whose last one, the assistant's, is the label. One JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """One turn; `role` is `system`, `user` or `assistant`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class Row(BaseModel):
    """A training or held-out example. `intent` is the answer's `intent` where answers are JSON objects with one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[Message]
    intent: str | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Every message but the last, as a chat template takes them."""
        return [message.model_dump() for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The label: the last message's content."""
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
            file.write(json.dumps(row.model_dump(), ensure_ascii=False) + "\n")
            count += 1
    return count
