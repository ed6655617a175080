"""Summary of token lengths: quantiles, histogram, rows over the limit, and how many a longer context would save."""

from typing import NamedTuple

import polars as pl

BINS = 40


class TokenLengths(NamedTuple):
    """`p*` are quantiles over the `sampled` rows; `saved` says how many of the `over` rows fit in a longer context."""

    sampled: int
    counted: int
    p0: int
    p50: int
    p90: int
    p99: int
    p100: int
    max_length: int
    over: int
    saved: dict[int, int]
    histogram: list[int]
    bin: int


def summarise(sampled: pl.Series, over: pl.Series, counted: int, max_length: int) -> TokenLengths:
    """Summarises the lengths of the `sampled` rows and of those `over` the limit.

    The result's `histogram` counts the sampled lengths in steps of `bin` tokens.
    """
    longest = int(over.max() or sampled.max() or 0)  # type: ignore[arg-type]
    width = max(1, -(-max(int(sampled.max() or 0), 1) // BINS))  # type: ignore[arg-type]
    bins = (sampled // width).value_counts()
    histogram = [0] * (int(sampled.max() or 0) // width + 1)  # type: ignore[arg-type]
    for index, count in bins.iter_rows():
        histogram[index] = count
    saved, context = {}, max_length
    while len(over) and context < longest:
        context *= 2
        saved[context] = int((over <= context).sum())
    p0, p50, p90, p99, p100 = (int(sampled.quantile(share, "nearest") or 0) for share in (0, 0.5, 0.9, 0.99, 1))
    return TokenLengths(
        len(sampled), counted, p0, p50, p90, p99, p100, max_length, len(over), saved, histogram, width
    )  # fmt: skip
