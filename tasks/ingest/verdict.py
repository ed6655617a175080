"""What becomes of each row: a split, or quarantine with a reason. Decided for all rows at once from their hashes.

A row's split follows from its question and the seed alone (its 64-bit hash below a threshold), so that it stays where
it is when rows are added, and equal questions stay together.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import polars as pl

from tasks.ingest import IngestConfig
from tasks.ingest.stage import Staged

MOST = 0.5
"""Answers are taken for JSON objects when more than this share of them are."""


def answers_kind(config: IngestConfig, staged: Staged) -> Literal["json", "text"]:
    """`json` when the config says so or most answers are JSON objects."""
    if config.answers != "auto":
        return config.answers
    objects = staged.columns["is_object"]
    return "json" if sum(objects) > MOST * len(objects) else "text"


def verdicts(config: IngestConfig, staged: Staged) -> pl.DataFrame:
    """One row a staged row, in order: the staged columns, `split`, `fault` (null when good) and `other`.

    `fault` is `not_json`, `leak`, `duplicate` or `conflict`; `other` the index of the row that it collides with.
    """
    json_answers = answers_kind(config, staged) == "json"
    given = [split for _, split in staged.files]
    frame = pl.DataFrame({name: pl.Series(name, column, pl.UInt64) for name, column in staged.columns.items()})
    frame = frame.with_row_index("row").with_columns(
        pl.col("file").replace_strict(dict(enumerate(given)), return_dtype=pl.String).alias("given")
    )
    frame = frame.with_columns(_split(config, given).alias("split"))
    good = frame.filter(pl.col("is_object") == 1) if json_answers else frame
    leaks = _leaks(good)
    good = good.join(leaks, on="row", how="anti")
    twins = ["split", "prompt", "answer"]
    duplicates = good.select("row", pl.col("row").min().over(twins).alias("other")).filter(
        pl.col("row") != pl.col("other")
    )
    conflicts = _conflicts(good)
    found = [leaks.with_columns(fault=pl.lit("leak"))]
    if config.drop_duplicates:
        found.append(duplicates.with_columns(fault=pl.lit("duplicate")))
        conflicts = conflicts.join(duplicates, on="row", how="anti")
    if json_answers:
        found.append(conflicts.with_columns(fault=pl.lit("conflict")))
    faults = pl.concat(found).unique("row", keep="first", maintain_order=True)
    frame = frame.join(faults, on="row", how="left", maintain_order="left")
    if json_answers:
        frame = frame.with_columns(
            pl.when(pl.col("is_object") == 0).then(pl.lit("not_json")).otherwise(pl.col("fault")).alias("fault")
        )
    return frame


def conflicting_rows(frame: pl.DataFrame) -> int:
    """Good rows whose question another good row of the split answers otherwise (kept for free text only)."""
    return _conflicts(frame.filter(pl.col("fault").is_null())).height


def _split(config: IngestConfig, given: Sequence[str]) -> pl.Expr:
    """Rows of train files are drawn to the splits for which no file was given."""
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    bounds: Mapping[str, float] = {name: share for name, share in shares.items() if name not in given}
    draw, low = pl.col("draw").cast(pl.Float64) / 2**64, 0.0
    split = pl.col("given")
    for name, share in bounds.items():
        split = (
            pl.when((pl.col("given") == "train") & (draw >= low) & (draw < low + share))
            .then(pl.lit(name))
            .otherwise(split)
        )
        low += share
    return split


def _leaks(good: pl.DataFrame) -> pl.DataFrame:
    """Rows of train or validation whose question stands in a split further right: that side keeps it."""
    order = {"train": 0, "validation": 1, "test": 2}
    ranked = good.select("row", "prompt", pl.col("split").replace_strict(order, return_dtype=pl.Int8).alias("rank"))
    top = pl.col("rank").max().over("prompt")
    first = pl.col("row").sort_by("rank", descending=True, maintain_order=True).first().over("prompt")
    return ranked.with_columns(other=first, top=top).filter(pl.col("rank") < pl.col("top")).select("row", "other")


def _conflicts(good: pl.DataFrame) -> pl.DataFrame:
    """Rows whose question has two different answers in the split; `other` is one that is answered otherwise."""
    key = ["split", "prompt"]
    several = good.filter(pl.col("answer").n_unique().over(key) > 1)
    first = pl.col("row").first().over(key)
    first_answer = pl.col("answer").first().over(key)
    other_row = pl.col("row").filter(pl.col("answer") != pl.col("answer").first()).first().over(key)
    other = pl.when(pl.col("answer") == first_answer).then(other_row).otherwise(first)
    return several.select("row", other.alias("other"))
