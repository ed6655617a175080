"""Rows for the tests of ingest, and a fixture that runs the stage in a temporary directory."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tasks.core.command import Report
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row, read_rows
from tasks.ingest import IngestConfig
from tasks.ingest.run import ingest
from tests.pico import pico_tokenizer

SPLITS = ("train", "validation", "test")


class Run:
    """One run of the stage: its report and what it wrote."""

    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report = out, report

    def rows(self, split: str) -> list[Row]:
        return list(read_rows(self.out / f"{split}.jsonl"))

    def all(self) -> list[Row]:
        return [row for split in SPLITS for row in self.rows(split)]

    def splits(self) -> dict[str, str]:
        """The split of each question."""
        return {row.messages[-2].content: split for split in SPLITS for row in self.rows(split)}

    def quarantine(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "quarantine.jsonl").read_text().splitlines()]

    def profile(self) -> dict[str, Any]:
        return json.loads((self.out / "profile.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., Run]:
    """Runs the stage on rows (or a path) with settings, each time into a directory of its own."""

    def run(data: Any, tokenizer: ModelDir | None = None, **config: Any) -> Run:
        directory = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        out = directory / "out"
        out.mkdir(parents=True)
        files = data
        if not isinstance(data, Path):
            files = directory / "train.jsonl"
            files.write_text("".join(json.dumps(row) + "\n" for row in data))
        return Run(out, ingest(IngestConfig(**config), files, out, Job(directory / "work"), tokenizer))

    return run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    return ModelDir(pico_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of twelve made-up words each, so that no two are alike."""
    random = Random(seed)

    def words(number: int) -> str:
        return " ".join("".join(random.choices("abcdefghijklmnop", k=random.randint(3, 8))) for _ in range(number))

    return [{"question": words(12) + "?", "answer": words(5) + "."} for _ in range(count)]


def intent_row(number: int, intent: str) -> dict[str, Any]:
    answer = json.dumps({"intent": intent, "entities": {"audit": str(number)}})
    return {"instruction": f"Please {intent} number {number}.", "output": answer}
