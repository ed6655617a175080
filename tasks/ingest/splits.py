"""Draws each row's split, and picks the rows of train for calibration.

A row's draw is the hash of its group and the seed, as a number below 1; it goes to test when that is below
`test_fraction`, to validation when it is in the next `validation_fraction`. The group is the first question, if nothing
else is asked for (`tasks.ingest.split_groups`). So a row keeps its split when rows are added or reordered, equal
questions and whole conversations stay together, and every intent is held out in the same share, give or take chance.
Where chance leaves test without any row of an intent of `MIN_INTENT_ROWS` rows or more, it gets the lowest-drawn one.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from tasks.ingest import IngestConfig

MIN_INTENT_ROWS = 10
GOLDEN = 0x9E3779B97F4A7C15


def draw_splits(
    config: IngestConfig, rows: pl.DataFrame, file_splits: Mapping[int, str], intents: Mapping[int, int]
) -> pl.DataFrame:
    """Adds `split`: what the file's name says, or for rows of train files one drawn among those without a file.

    `rows` have their `group`; a row that is nothing but a `common` opening goes to train.
    """
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    shares = {name: share for name, share in shares.items() if share and name not in file_splits.values()}
    rows = rows.with_columns(split=pl.col("file").replace_strict(dict(file_splits), return_dtype=pl.String))
    if not shares:
        return rows
    draw, low, drawn = pl.col("group").cast(pl.Float64) / 2**64, 0.0, pl.lit("train")
    for name, share in shares.items():
        drawn = pl.when((draw >= low) & (draw < low + share)).then(pl.lit(name)).otherwise(drawn)
        low += share
    from_file = pl.col("file").replace_strict(dict(file_splits), return_dtype=pl.String) != "train"
    drawn = pl.when(pl.col("common")).then(pl.lit("train")).otherwise(drawn)
    rows = rows.with_columns(split=pl.when(~from_file).then(drawn).otherwise(pl.col("split")))
    if len(set(intents.values())) > 1 and "test" in shares:
        intent = pl.col("kind").replace_strict(dict(intents), return_dtype=pl.UInt32).alias("intent")
        return _with_every_intent(rows, intent, from_file | pl.col("common"))
    return rows


def _with_every_intent(rows: pl.DataFrame, intent: pl.Expr, is_fixed: pl.Expr) -> pl.DataFrame:
    """Gives test the lowest-drawn question of every intent that has enough rows and none there."""
    drawn = rows.filter(~is_fixed).select(intent, "group", is_test=pl.col("split") == "test")
    lowest = drawn.group_by("intent").agg(pl.len(), pl.col("is_test").any(), pl.col("group").min())
    forced = lowest.filter((pl.col("len") >= MIN_INTENT_ROWS) & ~pl.col("is_test"))["group"]
    if forced.is_empty():
        return rows
    to_test = pl.col("group").is_in(forced.implode())
    return rows.with_columns(split=pl.when(to_test & ~is_fixed).then(pl.lit("test")).otherwise(pl.col("split")))


def pick_calibration(train: pl.DataFrame, intents: Mapping[int, int], count: int) -> pl.DataFrame:
    """`count` rows of train with their `index` in calibration.jsonl: every intent in its share, in a seeded order.

    Taking the first n of them is again a sample.
    """
    if not count or train.height <= count:
        train = train.head(count)
        ordered = train.select("row", order=seeded_order()).sort("order")
        return ordered.select("row").with_row_index("index")
    intent = pl.col("kind").replace_strict(dict(intents), return_dtype=pl.UInt32)
    ranked = train.select("row", order=seeded_order(), intent=intent).sort("order")
    sizes = ranked.group_by("intent").len().sort("intent")
    quota = dict(zip(sizes["intent"], _apportion(sizes["len"].to_numpy(), count), strict=True))
    index_in_intent = pl.int_range(pl.len()).over("intent")
    limit = pl.col("intent").replace_strict(quota, return_dtype=pl.Int64)
    return ranked.filter(index_in_intent < limit).select("row").with_row_index("index")


def seeded_order() -> pl.Expr:
    """The draw, shuffled: among rows of train the draw itself leaves out the lowest numbers."""
    return pl.col("question").map_batches(lambda s: pl.Series(s.to_numpy() * np.uint64(GOLDEN)), pl.UInt64)


def _apportion(sizes: "np.ndarray[tuple[int], np.dtype[np.int64]]", count: int) -> list[int]:
    """Whole numbers in the ratio of `sizes` that add up to `count` (largest remainders), one for each at least."""
    exact = sizes * (count / sizes.sum())
    shares = np.maximum(np.floor(exact), 1)
    for index in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, int(count - shares.sum()))]:
        shares[index] += 1
    return [int(share) for share in np.minimum(shares, sizes)]
