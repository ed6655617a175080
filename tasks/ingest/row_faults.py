"""Faults and splits of rows, decided on columns for all rows at once."""

from collections.abc import Mapping
from typing import Literal

import polars as pl

from tasks.ingest import IngestConfig
from tasks.ingest.canonical import AnswerKinds
from tasks.ingest.first_pass import ParsedRows
from tasks.ingest.schema import Schema, infer
from tasks.ingest.split_groups import contexts_of
from tasks.ingest.splits import draw_splits

JSON_SHARE = 0.5
"""Answers count as JSON when more than this share of them are JSON objects."""

Faults = pl.DataFrame  # row, fault (its name), other (the row that it collides with, or null)
COUNTED_FAULTS = ("not_json", "schema", "over_long", "conflict")
"""Faults that count towards `max_quarantined_fraction`; the others are rows that would be good alone."""


def answer_format(config: IngestConfig, parsed: ParsedRows) -> Literal["json", "text"]:
    """`json` when the config says so or most answers are JSON objects."""
    if config.answers != "auto":
        return config.answers
    return "json" if (parsed.rows["is_object"].mean() or 0) > JSON_SHARE else "text"  # type: ignore[operator]


def answer_schema(config: IngestConfig, parsed: ParsedRows) -> Schema | None:
    """The schema of the JSON answers; None when they are too various."""
    counts = parsed.rows.group_by("kind").len()
    return infer(parsed.kinds, dict(counts.iter_rows()), config.schema_share)


def answer_faults(
    rows: pl.DataFrame, kinds: AnswerKinds, schema: Schema | None, is_json: bool
) -> tuple[Faults, Mapping[int, str]]:
    """Rows whose answer should be a JSON object and is none, or not of the schema; the latter's reasons by kind."""
    reasons: dict[int, str] = {}
    for number, kind in enumerate(kinds.all):
        if schema and kind.signature is not None:
            empty = not kind.intent and ("intent", "a string", None) in kind.signature
            if reason := schema.fault(kind.signature) or ("the answer's 'intent' is empty" if empty else None):
                reasons[number] = reason
    not_json = rows.filter((pl.col("is_object") == 0) & is_json).select(
        "row", fault=pl.lit("not_json"), other=NO_OTHER_ROW
    )
    off_schema = rows.filter(pl.col("kind").is_in(list(reasons))).select(
        "row", fault=pl.lit("schema"), other=NO_OTHER_ROW
    )
    return pl.concat([not_json, off_schema]), reasons


NO_OTHER_ROW = pl.lit(None, pl.UInt32)


def assign_splits(
    config: IngestConfig,
    rows: pl.DataFrame,
    relations: pl.DataFrame,
    file_splits: Mapping[int, str],
    intents: Mapping[int, int],
    is_json: bool,
) -> tuple[pl.DataFrame, Faults]:
    """`rows` with their `split`, and the faults that comparing rows shows: leaks, duplicates, conflicts.

    `rows` have no other fault, and a `group` by which splits are drawn; with near duplicates also `near`, a hash that
    almost equal questions share. `file_splits` are the splits by the files' names, `intents` the number of a kind's
    intent.
    """
    rows = draw_splits(config, rows, file_splits, intents)
    shared = [_leaks(rows, "question", "leak"), _conversation_leaks(rows, contexts_of(relations))]
    shared += [_leaks(rows, "near", "leak")] if "near" in rows.columns else []
    shared += [_leaks(rows, "group", "group_leak")] if config.group_by else []
    leaks = pl.concat(shared).unique("row", keep="first", maintain_order=True)
    remaining = rows.join(leaks, on="row", how="anti", maintain_order="left")
    faults = [leaks]
    if config.drop_duplicates:
        faults.append(_duplicates(remaining, "question", "duplicate"))
        remaining = remaining.join(faults[-1], on="row", how="anti", maintain_order="left")
    if config.near_duplicates == "drop":
        faults.append(_duplicates(remaining, "near", "near_duplicate"))
        remaining = remaining.join(faults[-1], on="row", how="anti", maintain_order="left")
    if is_json:
        faults.append(_conflicts(remaining))
    return rows, pl.concat(faults)


def count_conflicts(rows: pl.DataFrame, key: str) -> int:
    """Number of rows whose `key` (question, as it is written, or near) has different answers in their split."""
    keys = ["split", key, *(["written"] if key == "question" else [])]
    rows_of_key = repeated(rows, key).select(*keys, "answer")
    return rows_of_key.filter(pl.col("answer").n_unique().over(keys) > 1).height


def repeated(rows: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows whose `key` occurs more than once: usually few, which keeps the comparisons cheap."""
    return rows.filter(pl.col(key).is_duplicated())


RANK = pl.col("split").replace_strict({"train": 0, "validation": 1, "test": 2}, return_dtype=pl.Int8).alias("rank")


def _leaks(rows: pl.DataFrame, key: str, fault: str) -> Faults:
    """Rows of train or validation whose `key` is in validation or test, too, where it stays."""
    ranked = repeated(rows, key).select("row", key, RANK)
    top = pl.col("rank").max().over(key)
    first = pl.col("row").sort_by("rank", descending=True, maintain_order=True).first().over(key)
    leaks = ranked.with_columns(other=first, top=top).filter(pl.col("rank") < pl.col("top"))
    return leaks.select("row", fault=pl.lit(fault), other="other")


def _conversation_leaks(rows: pl.DataFrame, contexts: pl.DataFrame) -> Faults:
    """Rows of train or validation that begin a conversation of validation or test, or that go on from one."""
    if contexts.is_empty():
        return rows.clear().select("row", fault=pl.lit("conversation_leak"), other=NO_OTHER_ROW)
    inner = contexts.join(rows.select("row", RANK), on="row").select("row", "hash", "rank")
    whole = rows.select("row", RANK, hash="question").filter(pl.col("hash").is_in(inner["hash"].unique().implode()))
    inner = inner.filter(pl.col("hash").is_in(whole["hash"].unique().implode()))
    leaks = []
    for side, others in ((inner, whole), (whole, inner)):
        highest = others.sort("rank", "row", descending=[True, False]).unique("hash", keep="first", maintain_order=True)
        pairs = side.join(highest.select("hash", other="row", top="rank"), on="hash")
        pairs = pairs.filter(pl.col("rank") < pl.col("top")).sort("top", descending=True)
        leaks.append(pairs.select("row", "other"))
    rows_and_others = pl.concat(leaks).unique("row", keep="first", maintain_order=True)
    return rows_and_others.select("row", fault=pl.lit("conversation_leak"), other="other")


def _duplicates(rows: pl.DataFrame, key: str, fault: str) -> Faults:
    rows_of_key = repeated(rows, key).select("row", other=pl.col("row").min().over("split", key, "answer"))
    return rows_of_key.filter(pl.col("row") != pl.col("other")).select("row", fault=pl.lit(fault), other="other")


def _conflicts(rows: pl.DataFrame) -> Faults:
    """Rows whose question, as it is written, has two different answers in the split; `other` is one of the other."""
    key = ["split", "question", "written"]
    rows_of_key = repeated(rows, "question").filter(pl.col("answer").n_unique().over(key) > 1)
    first, first_answer = pl.col("row").first().over(key), pl.col("answer").first().over(key)
    other_row = pl.col("row").filter(pl.col("answer") != pl.col("answer").first()).first().over(key)
    other = pl.when(pl.col("answer") == first_answer).then(other_row).otherwise(first)
    return rows_of_key.select("row", fault=pl.lit("conflict"), other=other)
