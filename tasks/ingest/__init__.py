"""Config of the ingest stage, which turns a team's own files into checked rows in train, validation and test."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import RUN_WIDE, OnlyWith, StageConfig
from tasks.core.named_choice import NameIn
from tasks.ingest.row_shapes import SHAPES


class IngestConfig(StageConfig):
    """How files become a checked dataset: the shape of their rows, which are held out, which are refused."""

    format: Annotated[str, NameIn(SHAPES, "auto")] = "auto"
    """Shape of the rows; `auto` recognises each file by the fields of its first rows."""

    answers: Literal["auto", "json", "text"] = "auto"
    """Format of the answers: JSON objects (anything else is quarantined) or free text; `auto` decides by most of
    them."""

    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own."""

    learn_turns: Literal["all", "last"] = "all"
    """Which of a conversation's assistant messages are labels; one marked `weight: 0` (as OpenAI does) never is."""

    ignore_fields: list[str] = []
    """Fields of rows or messages that are not read although they can change what an answer means, as `rating` or
    `reasoning_content` do: without this, rows that have them are quarantined."""

    max_row_bytes: int = Field(default=16 << 20, ge=1 << 10)
    """A row of more bytes is quarantined without being kept in memory."""

    max_expansion: int = Field(default=200, ge=1)
    """A compressed file of more than 256 MB may have this many times its size when it is decompressed."""

    test_fraction: float = Field(default=0.1, ge=0, le=0.5)
    """Share of rows held out for evaluation when no test file is given."""

    validation_fraction: float = Field(default=0.05, ge=0, le=0.5)
    """Share of rows held out for validation during training when no validation file is given."""

    seed: int = Field(default=0, ge=0)
    """Decides with a row's question to which split it goes."""

    calibration_rows: int = Field(default=512, ge=0)
    """Rows of train that also go to calibration.jsonl, for activation statistics; intents keep their shares."""

    drop_duplicates: bool = True
    """Keep the first of several equal rows (equal question and answer) only."""

    near_duplicates: Literal["off", "together", "drop"] = "off"
    """Look for almost equal questions (MinHash) and keep them on one side of the splits; `drop` also keeps only the
    first of those whose answers are equal."""

    near_threshold: Annotated[float, OnlyWith("near_duplicates", ("together", "drop"))] = Field(0.8, ge=0.6, le=1)
    """Questions count as almost equal from this Jaccard similarity of their 5-byte shingles on."""

    group_by: str | None = None
    """A field of the rows (`customer_id`, or a path: `metadata.customer`); rows with the same value go to one split."""

    schema_share: Annotated[float, OnlyWith("answers", ("auto", "json"))] = Field(default=0.98, gt=0.5, le=1)
    """What this share of the JSON answers has in common (a field, its type) is required of all of them."""

    max_length: Annotated[int, RUN_WIDE] = Field(default=2048, ge=16)
    """Tokens that a row may have, chat template included; counted when a tokenizer is given."""

    over_long: Literal["drop", "cut", "fail"] = "drop"
    """What happens to a row over `max_length`: quarantine, its question cut at the end (and listed in cut.jsonl), or
    the stage fails."""

    chat_template: Annotated[Literal["model", "gemma"], RUN_WIDE] = "model"
    """The template that tokens are counted with: the tokenizer's own, or Gemma's for a base model that has none."""

    minimum_rows: int = Field(default=50, ge=1)
    """Fewer good rows than this to learn from fail the stage."""

    allow_few_rows: bool = False
    """Warn instead of failing when there are fewer good rows than `minimum_rows`."""

    max_quarantined_fraction: float = Field(default=0.1, ge=0, le=1)
    """A larger share of faulty rows fails the stage: then the file, not the rows, is likely to be wrong."""

    out_of_scope_intent: Annotated[str, RUN_WIDE] = "out_of_scope"
    """The intent of questions that the model should decline, in answers that are JSON objects with an `intent`."""
