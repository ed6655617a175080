"""Rows for training tests: short questions with JSON answers that a pico model can begin to learn."""

from pathlib import Path

from tasks.core.rows import Message, Row
from tests.rows import write_rows


def example_rows(count: int, start: int = 0) -> list[Row]:
    return [
        Row(
            messages=[
                Message(role="user", content=f"Close audit {17 * n % 90} for the {['north', 'south hall'][n % 2]}."),
                Message(role="assistant", content=f'{{"intent": "close_audit", "audit": "{17 * n % 90}"}}'),
            ],
            intent="close_audit",
        )
        for n in range(start, start + count)
    ]


def example_dataset(directory: Path, train: int = 40, validation: int = 10) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_rows(directory / "train.jsonl", example_rows(train))
    write_rows(directory / "validation.jsonl", example_rows(validation, start=train))
    return directory
