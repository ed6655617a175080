"""Ingest: a team's own files in, checked rows in train, validation and test out. This is the stage's config."""

from typing import Literal

from pydantic import Field

from tasks.core.config import StageConfig

Format = Literal[
    "auto",
    "messages",
    "conversations",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "problem_solution",
    "prompt_story",
    "command_json",
]


class IngestConfig(StageConfig):
    """How files become a dataset."""

    format: Format = "auto"
    """Shape of the rows; `auto` recognises each file by the fields of its first rows."""

    answers: Literal["auto", "json", "text"] = "auto"
    """What answers are: JSON objects (anything else is quarantined) or free text; `auto` is what most of them are."""

    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own."""

    test_fraction: float = Field(default=0.1, ge=0, le=0.5)
    """Share of rows held out for evaluation when no test file is given."""

    validation_fraction: float = Field(default=0.05, ge=0, le=0.5)
    """Share of rows held out for validation during training when no validation file is given."""

    seed: int = Field(default=0, ge=0)
    """Decides with a row's content on which side of the splits it falls."""

    drop_duplicates: bool = True
    """Keep the first of several equal rows (equal question and answer) only."""

    minimum_rows: int = Field(default=50, ge=1)
    """Fewer good rows than this to learn from fail the stage."""

    allow_few_rows: bool = False
    """Go on, with a warning, when there are fewer good rows than `minimum_rows`."""

    max_quarantined_fraction: float = Field(default=0.1, ge=0, le=1)
    """A larger share of faulty rows fails the stage: then the file, not the rows, is likely to be wrong."""

    out_of_scope_intent: str = "out_of_scope"
    """The intent of questions that the model should decline, in answers that are JSON objects with an `intent`."""
