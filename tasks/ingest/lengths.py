"""Counts rows' tokens with the training tokenizer: of every row that may be too long, and of a sample.

A row cannot have more tokens than bytes, so a row whose canonical line has no more than `max_length` bytes is not
too long whatever the tokenizer says, and is counted for the histogram only.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import orjson
import polars as pl
from transformers import PreTrainedTokenizerBase

from tasks.core.job import Job
from tasks.core.rows import Row
from tasks.engine.data.chat_template import count_tokens
from tasks.ingest.first_pass import canonical_lines
from tasks.ingest.splits import seeded_order

SAMPLE = 2000
BATCH = 500
# By how much normalisation may lengthen a text in UTF-8 (unicode.org/faq/normalization.html).
EXPANSION = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}


class CountedLengths(NamedTuple):
    """`counted` has `row` and `tokens` of the rows in `sample` and of every row that may pass `max_length`."""

    counted: pl.DataFrame
    sample: pl.Series

    def over(self, max_length: int) -> pl.DataFrame:
        """Rows over the limit."""
        return self.counted.filter(pl.col("tokens") > max_length)

    @property
    def histogram(self) -> pl.Series:
        """Tokens of the sampled rows."""
        return self.counted.filter(pl.col("row").is_in(self.sample.implode()))["tokens"]


def count_lengths(
    tokenizer: PreTrainedTokenizerBase, rows: pl.DataFrame, line_files: list[Path], max_length: int, job: Job
) -> CountedLengths:
    """Counts the tokens of a sample of `rows` and of those whose bytes do not rule out more than `max_length`."""
    sample = rows.select("row", order=seeded_order()).bottom_k(SAMPLE, by="order")["row"].sort()
    ratio, fixed = tokens_per_byte(tokenizer)
    may_pass = rows.filter(pl.col("bytes").cast(pl.Int64) * ratio + fixed > max_length)["row"]
    counted = pl.concat([sample, may_pass]).unique().sort()
    tokens: list[int] = []
    lines = lines_of(line_files, counted)
    while batch := list(islice(lines, BATCH)):
        tokens += count_tokens(tokenizer, [Row.model_validate_json(line) for line in batch])
        job.progress(len(tokens), len(counted), "rows", "counting tokens")
    return CountedLengths(pl.DataFrame({"row": counted, "tokens": pl.Series(tokens, dtype=pl.UInt32)}), sample)


def tokens_per_byte(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Upper bounds: tokens that a byte of a canonical line can become, and tokens that the template adds to a row."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return 1 << 20, 0  # no bound is known: every row is counted
    normalizer = orjson.loads(backend.to_str())["normalizer"] or {}
    steps = [normalizer, *normalizer.get("normalizers", [])]
    ratio = max([EXPANSION.get(step.get("type"), 1) for step in steps])
    empty = Row.model_validate(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], "intent": None}
    )
    return ratio, count_tokens(tokenizer, [empty])[0]


def lines_of(line_files: list[Path], rows: pl.Series) -> Iterator[bytes]:
    """The canonical lines of the rows with these numbers, which are sorted."""
    numbers = iter(rows.to_list())
    following = next(numbers, None)
    for number, line in enumerate(canonical_lines(line_files)):
        if number == following:
            yield line
            following = next(numbers, None)
            if following is None:
                return


def cut_question(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Row | None:
    """The row with the end of its last question cut until it fits; None when even an empty question would not fit."""
    index = len(row.messages) - 2
    text = row.messages[index].content

    def cut(length: int) -> Row:
        messages = list(row.messages)
        messages[index] = messages[index].model_copy(update={"content": text[:length].rstrip()})
        return row.model_copy(update={"messages": messages})

    low, high = 0, len(text)  # the longest length that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_tokens(tokenizer, [cut(middle)])[0] <= max_length else (low, middle)
    return cut(low) if cut(low).messages[index].content else None
