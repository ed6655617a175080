"""Between the two passes: everything that is decided on columns, and what it needs of the rows' text."""

from typing import Any, NamedTuple

import polars as pl

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row
from tasks.ingest import IngestConfig
from tasks.ingest.reasons import Found
from tasks.ingest.row_outcomes import (
    NOBODY,
    answer_faults,
    answer_schema,
    answers_kind,
    count_conflicts,
    repeated,
    split_and_compare,
)
from tasks.ingest.splits import pick_calibration
from tasks.ingest.stage import Staged, staged_lines
from tasks.ingest.tokens import Tokens, summarise


class Judged(NamedTuple):
    """`good` rows with their `split`; `compared` are those with a split, good or not; `near` counts groups.

    `cut` are the lines that were shortened and their tokens before; `calibration` the places in calibration.jsonl.
    """

    answers: str
    schema: dict[str, Any] | None
    good: pl.DataFrame
    compared: pl.DataFrame
    found: Found
    cut: dict[int, tuple[bytes, int]]
    calibration: dict[int, int]
    near: dict[str, int] | None
    tokens: Tokens | None


def judge(config: IngestConfig, staged: Staged, tokenizer: ModelDir | None, job: Job) -> Judged:
    """Decides on every staged row. Raises BadData for rows over max_length where the config says `fail`."""
    answers = answers_kind(config, staged)
    schema = answer_schema(config, staged) if answers == "json" else None
    good = staged.rows.with_row_index("row")
    faults, odd = answer_faults(good, staged.kinds, schema, answers == "json")
    good = _without(good, faults)
    tokens, long, cut = _lengths(config, tokenizer, good, staged, job)
    rows = pl.DataFrame({"row": pl.Series(list(long), dtype=pl.UInt32)})
    too_long = rows.select("row", fault=pl.lit("over_long"), other=NOBODY)
    compared = _grouped(config, _without(good, too_long), staged, job)
    intents = _intent_numbers(staged)
    given = {number: split for number, (_, split) in enumerate(staged.files)}
    compared, among = split_and_compare(config, compared, given, intents, answers == "json")
    good = _without(compared, among)
    chosen = pick_calibration(good.filter(pl.col("split") == "train"), intents, config.calibration_rows)
    return Judged(
        answers=answers,
        schema=schema.to_json() if schema else None,
        good=good,
        compared=compared,
        found=Found(pl.concat([faults, too_long, among]), odd, long, config.max_length),
        cut=cut,
        calibration=dict(chosen.select("row", "place").iter_rows()),
        near=_near(config, compared, good),
        tokens=tokens,
    )


def _without(rows: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    return rows.join(faults, on="row", how="anti", maintain_order="left") if faults.height else rows


def _intent_numbers(staged: Staged) -> dict[int, int]:
    """A number for each kind's intent; 0 for answers without one."""
    names = sorted({kind.intent for kind in staged.kinds.all if kind.intent})
    places = {name: place for place, name in enumerate(names, start=1)}
    return {number: places.get(kind.intent or "", 0) for number, kind in enumerate(staged.kinds.all)}


def _lengths(
    config: IngestConfig, tokenizer: ModelDir | None, rows: pl.DataFrame, staged: Staged, job: Job
) -> tuple[Tokens | None, dict[int, int], dict[int, tuple[bytes, int]]]:
    """What was counted; rows that must go, with their tokens; rows that were cut."""
    if tokenizer is None or not rows.height:
        return None, {}, {}
    from tasks.engine.models.load import load_tokenizer  # noqa: PLC0415  (torch: only where a tokenizer is given)
    from tasks.ingest.lengths import count_lengths, cut_question, lines_of  # noqa: PLC0415

    loaded = load_tokenizer(tokenizer, config.chat_template)
    lengths = count_lengths(loaded, rows, staged.lines, config.max_length, job)
    over = lengths.over(config.max_length)
    summary = summarise(lengths.histogram, over["tokens"], lengths.counted.height, config.max_length)
    long = dict(over.iter_rows())
    if not long or config.over_long == "drop":
        return summary, long, {}
    if config.over_long == "fail":
        row, tokens = next(iter(long.items()))
        place = f"{staged.files[staged.rows['file'][row]][0]}:{staged.rows['line'][row]}"
        raise BadData(
            f"{len(long)} rows are longer than max_length={config.max_length} tokens (first: {place} with {tokens}); "
            f"raise max_length, shorten them, or set over_long to drop or cut"
        )
    cut: dict[int, tuple[bytes, int]] = {}
    for row, line in zip(long, lines_of(staged.lines, over["row"]), strict=True):
        shorter = cut_question(loaded, Row.model_validate_json(line), config.max_length)
        if shorter is not None:
            cut[row] = (shorter.model_dump_json(exclude_none=False).encode(), long[row])
    return summary, {row: tokens for row, tokens in long.items() if row not in cut}, cut


def _grouped(config: IngestConfig, rows: pl.DataFrame, staged: Staged, job: Job) -> pl.DataFrame:
    """Adds `group`: the question's hash, or with near duplicates the lowest one among those that are almost equal."""
    if config.near_duplicates == "off":
        return rows.with_columns(group=pl.col("question"))
    from tasks.ingest.near_duplicates import near_groups  # noqa: PLC0415  (numpy and rensa, rarely needed)

    job.progress(0, 1, "steps", "looking for almost equal questions")
    first = near_groups(staged_lines(staged.lines), staged.rows.height, config.near_threshold, job.work / "near")
    with_first = rows.with_columns(first=pl.Series(first[rows["row"].to_numpy()]))
    lowest = repeated(with_first, "first").group_by("first").agg(group=pl.col("question").min())
    joined = with_first.join(lowest, on="first", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("group", "question").alias("group")).drop("first")


def _near(config: IngestConfig, compared: pl.DataFrame, good: pl.DataFrame) -> dict[str, int] | None:
    if config.near_duplicates == "off":
        return None
    several = compared.select("group", "question").unique().filter(pl.col("group").is_duplicated())
    return {
        "groups": several["group"].n_unique(),
        "questions": several.height,
        "answered_otherwise": count_conflicts(good, "group"),
    }
