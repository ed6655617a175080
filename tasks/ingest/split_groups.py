"""Groups of rows that go to one split: whole conversations, almost equal questions, or the values of `group_by`.

A conversation's group is its opening: the first question, in its context. So it holds every row that was unrolled from
it, that begins it or goes on from it, and stays what it is when rows are added. An opening that too many conversations
share (a greeting) would be a large part of a split; these are told apart by their next question.
"""

import polars as pl

from tasks.ingest.comparison import GROUP, WITHOUT_SYSTEM

COMMON_ROWS, COMMON_SHARE = 50, 0.02
"""An opening of more rows than both of these is common: its rows are told apart by their next question."""


def contexts_of(relations: pl.DataFrame) -> pl.DataFrame:
    """Row, depth and hash of the contexts before each row's last answer."""
    is_context = (pl.col("kind") != WITHOUT_SYSTEM) & (pl.col("kind") != GROUP)
    return relations.filter(is_context).rename({"kind": "depth"})


def group_by_field(rows: pl.DataFrame, relations: pl.DataFrame) -> pl.DataFrame:
    """Adds `group`, the hash of each row's value of the field, and `common`, false."""
    values = relations.filter(pl.col("kind") == GROUP).select("row", group="hash")
    return rows.join(values, on="row", how="left", maintain_order="left").with_columns(common=pl.lit(value=False))


def group_by_opening(rows: pl.DataFrame, relations: pl.DataFrame) -> pl.DataFrame:
    """Adds `group`, the hash of each row's opening, and `common`: whether the row is a common opening and nothing else.

    With a column `near`, openings that almost equal questions share are one group: the lowest hash among them.
    """
    contexts = contexts_of(relations)
    if contexts.is_empty():
        rows = rows.with_columns(group=pl.col("question"), common=pl.lit(value=False))
    else:
        rows = _by_opening(rows, contexts)
    return _joined(rows) if "near" in rows.columns else rows


def _by_opening(rows: pl.DataFrame, contexts: pl.DataFrame) -> pl.DataFrame:
    opening = contexts.filter(pl.col("depth") == 1).select("row", opening="hash")
    rows = rows.join(opening, on="row", how="left", maintain_order="left")
    rows = rows.with_columns(group=pl.coalesce("opening", "question"), common=pl.lit(value=False)).drop("opening")
    limit, depth = max(COMMON_ROWS, COMMON_SHARE * rows.height), 1
    while True:
        sizes = rows.group_by("group").agg(pl.len(), questions=pl.col("question").n_unique())
        common = sizes.filter((pl.col("len") > limit) & (pl.col("questions") > 1))["group"]
        if common.is_empty():
            return rows
        depth += 1
        following = contexts.filter(pl.col("depth") == depth).select("row", following="hash")
        rows = rows.join(following, on="row", how="left", maintain_order="left")
        is_common = pl.col("group").is_in(common.implode())
        rows = rows.with_columns(
            group=pl.when(is_common).then(pl.coalesce("following", "question")).otherwise(pl.col("group")),
            common=pl.col("common") | (is_common & (pl.col("group") == pl.col("question"))),
        ).drop("following")


def _joined(rows: pl.DataFrame) -> pl.DataFrame:
    """Openings and groups of almost equal questions that have rows in common become one group."""
    while True:
        lowest = pl.col("group").min()
        joined = rows.with_columns(group=lowest.over("near")).with_columns(opening=rows["group"])
        joined = joined.with_columns(group=lowest.over("opening")).drop("opening")
        if joined["group"].equals(rows["group"]):
            return rows
        rows = joined
