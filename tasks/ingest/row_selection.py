"""Selects rows between the two passes: faults, splits, calibration and cut rows, from columns and token counts."""

from typing import Any, NamedTuple

import orjson
import polars as pl

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row
from tasks.ingest import IngestConfig
from tasks.ingest.comparison import WITHOUT_SYSTEM, context_hashes
from tasks.ingest.first_pass import ParsedRows, canonical_lines
from tasks.ingest.reasons import FaultDetails
from tasks.ingest.row_faults import (
    NO_OTHER_ROW,
    answer_faults,
    answer_format,
    answer_schema,
    assign_splits,
    count_conflicts,
    repeated,
)
from tasks.ingest.split_groups import group_by_field, group_by_opening
from tasks.ingest.splits import pick_calibration
from tasks.ingest.tokens import TokenLengths, summarise


class CutRow(NamedTuple):
    """The canonical line of a row whose question was shortened, and its tokens before."""

    line: bytes
    tokens: int


class SystemTwins(NamedTuple):
    """Held-out rows whose question is one of train under another system message: their number, and the first pair."""

    rows: int
    held_out: int
    train: int


class Selection(NamedTuple):
    """The `good` rows with their `split`; `split_rows` are all rows with a split.

    `cut` is by row number, `calibration` the index in calibration.jsonl by row number; `near_duplicates` counts groups.
    `common_openings` are rows that begin with a question too frequent to be kept together.
    """

    answers: str
    schema: dict[str, Any] | None
    good: pl.DataFrame
    split_rows: pl.DataFrame
    fault_details: FaultDetails
    cut: dict[int, CutRow]
    calibration: dict[int, int]
    near_duplicates: dict[str, int] | None
    tokens: TokenLengths | None
    system_twins: SystemTwins | None
    common_openings: list[int]


def select_rows(config: IngestConfig, parsed: ParsedRows, tokenizer: ModelDir | None, job: Job) -> Selection:
    """Selects the parsed rows. Raises BadData for rows over max_length where the config says `fail`."""
    answers = answer_format(config, parsed)
    schema = answer_schema(config, parsed) if answers == "json" else None
    good = parsed.rows.with_row_index("row")
    faults, schema_reasons = answer_faults(good, parsed.kinds, schema, answers == "json")
    good = _without(good, faults)
    tokens, over_long, cut = _lengths(config, tokenizer, good, parsed, job)
    rows = pl.DataFrame({"row": pl.Series(list(over_long), dtype=pl.UInt32)})
    length_faults = rows.select("row", fault=pl.lit("over_long"), other=NO_OTHER_ROW)
    grouped = _with_groups(config, _without(good, length_faults), parsed, job)
    grouped = _with_cut_questions(config, grouped, cut)
    intents = _intent_numbers(parsed)
    file_splits = {number: split for number, (_, split) in enumerate(parsed.files)}
    split_rows, comparison_faults = assign_splits(
        config, grouped, parsed.relations, file_splits, intents, answers == "json"
    )
    good = _without(split_rows, comparison_faults)
    calibration = pick_calibration(good.filter(pl.col("split") == "train"), intents, config.calibration_rows)
    all_faults = pl.concat([faults, length_faults, comparison_faults])
    return Selection(
        answers=answers,
        schema=schema.to_json() if schema else None,
        good=good,
        split_rows=split_rows,
        fault_details=FaultDetails(all_faults, schema_reasons, over_long, config.max_length),
        cut={row: cut[row] for row in good.filter(pl.col("row").is_in(list(cut)))["row"]},  # others are quarantined
        calibration=dict(calibration.select("row", "index").iter_rows()),
        near_duplicates=_count_groups(config, split_rows, good),
        tokens=tokens,
        system_twins=_system_twins(good, parsed.relations),
        common_openings=split_rows.filter("common")
        .unique("question", keep="first", maintain_order=True)["row"]
        .to_list(),
    )


def _without(rows: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    return rows.join(faults, on="row", how="anti", maintain_order="left") if faults.height else rows


def _intent_numbers(parsed: ParsedRows) -> dict[int, int]:
    """A number for each kind's intent; 0 for answers without one."""
    names = sorted({kind.intent for kind in parsed.kinds.all if kind.intent})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    return {index: numbers.get(kind.intent or "", 0) for index, kind in enumerate(parsed.kinds.all)}


def _lengths(
    config: IngestConfig, tokenizer: ModelDir | None, rows: pl.DataFrame, parsed: ParsedRows, job: Job
) -> tuple[TokenLengths | None, dict[int, int], dict[int, CutRow]]:
    """Token lengths; rows over the limit that must go, with their tokens; rows that were cut."""
    if tokenizer is None or not rows.height:
        return None, {}, {}
    from tasks.engine.data.tokenizers import load_tokenizer  # noqa: PLC0415  (torch: only where a tokenizer is given)
    from tasks.ingest.lengths import count_lengths, cut_question, lines_of  # noqa: PLC0415

    loaded = load_tokenizer(tokenizer, config.chat_template)
    lengths = count_lengths(loaded, rows, parsed.line_files, config.max_length, job)
    over = lengths.over(config.max_length)
    summary = summarise(lengths.histogram, over["tokens"], lengths.counted.height, config.max_length)
    over_long = dict(over.iter_rows())
    if not over_long or config.over_long == "drop":
        return summary, over_long, {}
    if config.over_long == "fail":
        row, tokens = next(iter(over_long.items()))
        location = f"{parsed.files[parsed.rows['file'][row]][0]}:{parsed.rows['line'][row]}"
        raise BadData(
            f"{len(over_long)} rows are longer than max_length={config.max_length} tokens (first: {location} with "
            f"{tokens}); raise max_length, shorten them, or set over_long to drop or cut"
        )
    cut: dict[int, CutRow] = {}
    for row, line in zip(over_long, lines_of(parsed.line_files, over["row"]), strict=True):
        shorter = cut_question(loaded, Row.model_validate_json(line), config.max_length)
        if shorter is not None:
            cut[row] = CutRow(shorter.model_dump_json(exclude_none=False).encode(), over_long[row])
    return summary, {row: tokens for row, tokens in over_long.items() if row not in cut}, cut


def _with_groups(config: IngestConfig, rows: pl.DataFrame, parsed: ParsedRows, job: Job) -> pl.DataFrame:
    """Adds `group`, by which splits are drawn, and with near duplicates `near`: the lowest hash among almost equal
    questions."""
    if config.near_duplicates != "off":
        rows = _with_near(config, rows, parsed, job)
    if config.group_by:
        return group_by_field(rows, parsed.relations)
    return group_by_opening(rows, parsed.relations)


def _with_near(config: IngestConfig, rows: pl.DataFrame, parsed: ParsedRows, job: Job) -> pl.DataFrame:
    from tasks.ingest.near_duplicates import near_groups  # noqa: PLC0415  (numpy and rensa, rarely needed)

    job.progress(0, 1, "steps", "looking for almost equal questions")
    lines, total = canonical_lines(parsed.line_files), parsed.rows.height
    first = near_groups(lines, total, config.near_threshold, job.work / "near")
    with_first = rows.with_columns(first=pl.Series(first[rows["row"].to_numpy()]))
    lowest = repeated(with_first, "first").group_by("first").agg(near=pl.col("question").min())
    joined = with_first.join(lowest, on="first", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("near", "question").alias("near")).drop("first")


def _with_cut_questions(config: IngestConfig, rows: pl.DataFrame, cut: dict[int, CutRow]) -> pl.DataFrame:
    """Rows that were cut are compared by the question that is written; their draw stays that of the whole one."""
    if not cut:
        return rows
    salt, hashes = b"%d\n" % config.seed, dict[int, int]()
    for row, cut_row in cut.items():
        messages = orjson.loads(cut_row.line)["messages"]
        context = context_hashes([(message["role"], message["content"]) for message in messages], salt)[-1]
        hashes[row] = int.from_bytes(context, "little")
    shorter = pl.DataFrame({"row": list(hashes), "cut": list(hashes.values())}, {"row": pl.UInt32, "cut": pl.UInt64})
    rows = rows.join(shorter, on="row", how="left", maintain_order="left")
    return rows.with_columns(
        question=pl.coalesce("cut", "question"),
        written=pl.coalesce(pl.col("cut") % 2**32, "written").cast(pl.UInt32),
    ).drop("cut")


def _system_twins(good: pl.DataFrame, relations: pl.DataFrame) -> SystemTwins | None:
    """Held-out rows that differ from a row of train in the system message alone; None where there is none."""
    without = relations.filter(pl.col("kind") == WITHOUT_SYSTEM).select("row", alone="hash")
    if without.is_empty():
        return None
    rows = good.select("row", "split", "question").join(without, on="row", how="left", maintain_order="left")
    rows = rows.select("row", "split", alone=pl.coalesce("alone", "question"))
    train = rows.filter(pl.col("split") == "train").unique("alone", keep="first", maintain_order=True)
    held_out = rows.filter(pl.col("split") != "train")
    pairs = held_out.join(train.select("alone", train="row"), on="alone", maintain_order="left")
    return SystemTwins(pairs.height, *pairs.select("row", "train").row(0)) if pairs.height else None


def _count_groups(config: IngestConfig, split_rows: pl.DataFrame, good: pl.DataFrame) -> dict[str, int] | None:
    """Groups of almost equal questions, the questions in them, and the good rows that differ in their answers."""
    if config.near_duplicates == "off":
        return None
    questions = split_rows.select("near", "question").unique().filter(pl.col("near").is_duplicated())
    return {
        "groups": questions["near"].n_unique(),
        "questions": questions.height,
        "answered_otherwise": count_conflicts(good, "near"),
    }
