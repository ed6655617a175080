"""What becomes of each row: a split, or quarantine with a reason. Decided on columns, for all rows at once."""

from collections.abc import Mapping
from typing import Literal

import polars as pl

from tasks.ingest import IngestConfig
from tasks.ingest.canonical import Kinds
from tasks.ingest.schema import Schema, infer
from tasks.ingest.splits import draw_splits
from tasks.ingest.stage import Staged

MOST = 0.5
"""Answers are taken for JSON objects when more than this share of them are."""

Faults = pl.DataFrame  # row, fault (its name), other (the row that it collides with, or null)
FAULTY = ("not_json", "schema", "over_long", "conflict")
"""Faults that count towards `max_quarantined_fraction`; the others are rows that would be good alone."""


def answers_kind(config: IngestConfig, staged: Staged) -> Literal["json", "text"]:
    """`json` when the config says so or most answers are JSON objects."""
    if config.answers != "auto":
        return config.answers
    return "json" if (staged.rows["is_object"].mean() or 0) > MOST else "text"  # type: ignore[operator]


def answer_schema(config: IngestConfig, staged: Staged) -> Schema | None:
    """What the JSON answers have in common."""
    counts = staged.rows.group_by("kind").len()
    return infer(staged.kinds, dict(counts.iter_rows()), config.schema_share)


def answer_faults(
    rows: pl.DataFrame, kinds: Kinds, schema: Schema | None, is_json: bool
) -> tuple[Faults, Mapping[int, str]]:
    """Rows whose answer should be a JSON object and is none, or not of the schema; the latter's reasons by kind."""
    reasons: dict[int, str] = {}
    for number, kind in enumerate(kinds.all):
        if schema and kind.signature is not None:
            empty = not kind.intent and ("intent", "a string", None) in kind.signature
            if reason := schema.fault(kind.signature) or ("the answer's 'intent' is empty" if empty else None):
                reasons[number] = reason
    not_json = rows.filter((pl.col("is_object") == 0) & is_json).select("row", fault=pl.lit("not_json"), other=NOBODY)
    odd = rows.filter(pl.col("kind").is_in(list(reasons))).select("row", fault=pl.lit("schema"), other=NOBODY)
    return pl.concat([not_json, odd]), reasons


NOBODY = pl.lit(None, pl.UInt32)


def split_and_compare(
    config: IngestConfig, rows: pl.DataFrame, given: Mapping[int, str], intents: Mapping[int, int], is_json: bool
) -> tuple[pl.DataFrame, Faults]:
    """`rows` with their `split`; those that must not stay because of others: leaks, duplicates, conflicts.

    `rows` are good so far and have `group`: a hash that equal (or almost equal) questions share. `given` is the split
    that a file's name says, `intents` the number of a kind's intent.
    """
    rows = draw_splits(config, rows, given, intents)
    leaks = _leaks(rows)
    left = rows.join(leaks, on="row", how="anti", maintain_order="left")
    found = [leaks]
    if config.drop_duplicates:
        found.append(_duplicates(left, "question", "duplicate"))
        left = left.join(found[-1], on="row", how="anti", maintain_order="left")
    if config.near_duplicates == "drop":
        found.append(_duplicates(left, "group", "near_duplicate"))
        left = left.join(found[-1], on="row", how="anti", maintain_order="left")
    if is_json:
        found.append(_conflicts(left))
    return rows, pl.concat(found)


def count_conflicts(rows: pl.DataFrame, key: str) -> int:
    """Rows whose `key` (question, or group of almost equal ones) another row of the split answers otherwise."""
    several = repeated(rows, key).select(key, "split", "answer")
    return several.filter(pl.col("answer").n_unique().over(key, "split") > 1).height


def repeated(rows: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows whose `key` occurs more than once: few, so that what follows costs little."""
    return rows.filter(pl.col(key).is_duplicated())


def _leaks(rows: pl.DataFrame) -> Faults:
    """Rows of train or validation whose question stands in a split further right: that side keeps it."""
    order = {"train": 0, "validation": 1, "test": 2}
    rank = pl.col("split").replace_strict(order, return_dtype=pl.Int8)
    ranked = repeated(rows, "group").select("row", "group", rank.alias("rank"))
    top = pl.col("rank").max().over("group")
    first = pl.col("row").sort_by("rank", descending=True, maintain_order=True).first().over("group")
    found = ranked.with_columns(other=first, top=top).filter(pl.col("rank") < pl.col("top"))
    return found.select("row", fault=pl.lit("leak"), other="other")


def _duplicates(rows: pl.DataFrame, key: str, fault: str) -> Faults:
    several = repeated(rows, key).select("row", other=pl.col("row").min().over("split", key, "answer"))
    return several.filter(pl.col("row") != pl.col("other")).select("row", fault=pl.lit(fault), other="other")


def _conflicts(rows: pl.DataFrame) -> Faults:
    """Rows whose question has two different answers in the split; `other` is one that is answered otherwise."""
    key = ["split", "question"]
    several = repeated(rows, "question").filter(pl.col("answer").n_unique().over(key) > 1)
    first, first_answer = pl.col("row").first().over(key), pl.col("answer").first().over(key)
    other_row = pl.col("row").filter(pl.col("answer") != pl.col("answer").first()).first().over(key)
    other = pl.when(pl.col("answer") == first_answer).then(other_row).otherwise(first)
    return several.select("row", fault=pl.lit("conflict"), other=other)
