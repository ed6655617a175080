"""Lengths in tokens, with the tokenizer that training uses: every row that might be too long, and a sample of all.

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
from tasks.ingest.splits import seeded_order
from tasks.ingest.stage import staged_lines

SAMPLE = 2000
BATCH = 500
# By how much normalisation may lengthen a text in UTF-8 (unicode.org/faq/normalization.html).
EXPANSION = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}


class Lengths(NamedTuple):
    """`counted` has `row`, `tokens`: of `sample` (rows of it only) and of every row that may pass `max_length`."""

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
    tokenizer: PreTrainedTokenizerBase, rows: pl.DataFrame, lines: list[Path], max_length: int, job: Job
) -> Lengths:
    """Counts the tokens of a sample of `rows` and of those whose bytes do not rule out more than `max_length`."""
    sample = rows.select("row", order=seeded_order()).bottom_k(SAMPLE, by="order")["row"].sort()
    ratio, fixed = tokens_per_byte(tokenizer)
    may_pass = rows.filter(pl.col("bytes").cast(pl.Int64) * ratio + fixed > max_length)["row"]
    wanted = pl.concat([sample, may_pass]).unique().sort()
    tokens: list[int] = []
    found = lines_of(lines, wanted)
    while batch := list(islice(found, BATCH)):
        tokens += count_tokens(tokenizer, [Row.model_validate_json(line) for line in batch])
        job.progress(len(tokens), len(wanted), "rows", "counting tokens")
    return Lengths(pl.DataFrame({"row": wanted, "tokens": pl.Series(tokens, dtype=pl.UInt32)}), sample)


def tokens_per_byte(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Most tokens that a byte of a canonical line can become, and those that the template writes beside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return 1 << 20, 0  # nothing is known: every row is counted
    normalizer = orjson.loads(backend.to_str())["normalizer"] or {}
    steps = [normalizer, *normalizer.get("normalizers", [])]
    ratio = max([EXPANSION.get(step.get("type"), 1) for step in steps])
    empty = Row.model_validate(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], "intent": None}
    )
    return ratio, count_tokens(tokenizer, [empty])[0]


def lines_of(lines: list[Path], wanted: pl.Series) -> Iterator[bytes]:
    """The canonical lines whose row numbers are in `wanted`, which is sorted."""
    numbers = iter(wanted.to_list())
    following = next(numbers, None)
    for number, line in enumerate(staged_lines(lines)):
        if number == following:
            yield line
            following = next(numbers, None)
            if following is None:
                return


def cut_question(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Row | None:
    """The row with the end of its last question cut until it fits; None when even an empty question would not fit."""
    place = len(row.messages) - 2
    text = row.messages[place].content

    def cut(length: int) -> Row:
        messages = list(row.messages)
        messages[place] = messages[place].model_copy(update={"content": text[:length].rstrip()})
        return row.model_copy(update={"messages": messages})

    low, high = 0, len(text)  # the longest length that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_tokens(tokenizer, [cut(middle)])[0] <= max_length else (low, middle)
    return cut(low) if cut(low).messages[place].content else None
