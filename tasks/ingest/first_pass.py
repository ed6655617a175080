"""First pass over the rows: each becomes a canonical line in a scratch file and 39 bytes of numbers in memory.

Files are read here, cut into blocks, and parsed by a process a core; results come back in file order.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import polars as pl

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.parent_process import die_with_parent
from tasks.ingest import IngestConfig
from tasks.ingest.block_parser import Block, FileRange, ParsedBlock, RowFormat, parse_block
from tasks.ingest.canonical import AnswerKinds
from tasks.ingest.exact_json import load_row
from tasks.ingest.json_arrays import is_json_lines
from tasks.ingest.json_lines import line_blocks
from tasks.ingest.read import is_settings_file, read_file
from tasks.ingest.row_fields import UnreadField, UnreadFields
from tasks.ingest.row_shapes import recognise_shape
from tasks.ingest.source_files import (
    JSON_SUFFIXES,
    ReadLimits,
    Split,
    UnreadableRow,
    data_files,
    file_format,
    is_compressed,
)

SHAPE_SAMPLE = 200  # rows of a file by which its shape is recognised
BLOCK_BYTES, BLOCK_ROWS = 4 << 20, 5000
SERIAL_BYTES = 32 << 20  # smaller data is parsed before workers have started
MAX_WORKERS = 8
MAX_FILES = 1 << 16
# The fields of RECORD as numpy reads them.
COLUMNS = np.dtype([("file", "<u2"), ("line", "<u4"), ("question", "<u8"), ("answer", "<u8"), ("kind", "<u4"),
                    ("is_object", "u1"), ("prompt_chars", "<u4"), ("answer_chars", "<u4"),
                    ("bytes", "<u4"), ("written", "<u4")])  # fmt: skip
RELATION_COLUMNS = np.dtype([("row", "<u4"), ("kind", "u1"), ("hash", "<u8")])


class PreferenceRows(NamedTuple):
    """Preference rows: the scratch file with their lines; the number of each one's file, its line, its question's hash
    (as `rows` has it)."""

    path: Path
    rows: list[tuple[int, int, int]]


class ParsedRows(NamedTuple):
    """Result of the first pass: `rows` has the numbers of each good row, in file order; `line_files` are the scratch
    files with their canonical lines, `line_counts` of them each; `faults` counts the quarantined rows, `unread` the
    fields that are not read, by name. `relations` has row, kind and hash of what some rows share with others
    (`tasks.ingest.comparison`)."""

    files: list[tuple[str, Split]]
    shapes: dict[str, str]
    rows: pl.DataFrame
    line_files: list[Path]
    line_counts: list[int]
    kinds: AnswerKinds
    faults: int
    skipped_files: list[str]
    preferences: PreferenceRows
    unread: dict[str, UnreadField]
    relations: pl.DataFrame


def parse_files(config: IngestConfig, files: Path, scratch: Path, quarantine: IO[bytes], job: Job) -> ParsedRows:
    """Reads all files; good rows go to files in `scratch`, faulty ones to `quarantine` with their reason."""
    paths, skipped = data_files(files)
    if settings := [path for path, _ in paths if len(paths) > 1 and is_settings_file(path)]:
        paths = [(path, split) for path, split in paths if path not in settings]
        skipped = [*skipped, *settings]
    if len(paths) > MAX_FILES:
        raise BadData(f"{len(paths)} files are more than {MAX_FILES}; put several into one")
    root = files if files.is_dir() else files.parent
    names = [(str(path.relative_to(root)), split) for path, split in paths]
    sizes = [path.stat().st_size for path, _ in paths]
    for (name, _), size in zip(names, sizes, strict=True):
        if not size:
            raise BadData(f"{name} is empty (0 bytes); give a file with rows, or take it away")
    shapes: dict[str, str] = {}
    blocks = _blocks(config, [path for path, _ in paths], [name for name, _ in names], shapes)
    scratch.mkdir()
    kinds, records, faults, line_files, line_counts = AnswerKinds(), bytearray(), 0, list[Path](), list[int]()
    unread, preferences = UnreadFields(), PreferenceRows(scratch / "preference", [])
    relations: list[np.ndarray[Any, Any]] = [np.empty(0, RELATION_COLUMNS)]
    for number, (block, parsed) in enumerate(_parsed_blocks(blocks, scratch, sum(sizes))):
        line_files.append(_line_file(scratch, number))
        quarantine.write(parsed.quarantine)
        line_counts.append(len(parsed.records) // COLUMNS.itemsize)
        if parsed.relations:
            relations.append(np.frombuffer(bytearray(parsed.relations), RELATION_COLUMNS))
            relations[-1]["row"] += len(records) // COLUMNS.itemsize
        records += _with_global_kinds(parsed, kinds)
        faults += parsed.faults
        unread.merge(parsed.unread)
        _add_preferences(block.file, parsed, preferences)
        if number % 8 == 0:
            job.progress(block.bytes_before, sum(sizes), "bytes", f"{block.name}: line {block.first_line}")
    job.progress(sum(sizes), sum(sizes), "bytes", "read")
    table = np.frombuffer(records, COLUMNS)
    rows = _columns(table)
    skipped_files = [str(path.relative_to(root)) for path in skipped]
    return ParsedRows(
        names,
        shapes,
        rows,
        line_files,
        line_counts,
        kinds,
        faults,
        skipped_files,
        preferences,
        unread.fields,
        _columns(np.concatenate(relations)),
    )


def _columns(table: "np.ndarray[Any, Any]") -> pl.DataFrame:
    """The fields of a structured array as columns."""
    names = table.dtype.names or ()
    return pl.DataFrame({name: pl.Series(name, np.ascontiguousarray(table[name])) for name in names})


def _add_preferences(file: int, block: ParsedBlock, preferences: PreferenceRows) -> None:
    """Adds a block's preference rows to those of the files before."""
    if block.preferences:
        with preferences.path.open("ab") as lines:
            lines.write(b"".join(row.line for _, row in block.preferences))
        preferences.rows.extend((file, line, int.from_bytes(row.question, "little")) for line, row in block.preferences)


def _line_file(scratch: Path, number: int) -> Path:
    return scratch / f"{number:06}"


def _with_global_kinds(block: ParsedBlock, kinds: AnswerKinds) -> bytes:
    """The block's records with the whole dataset's numbers of kinds."""
    numbers = np.array([kinds.number(kind) for kind in block.kinds], dtype="<u4")
    if len(numbers) == 1:
        return block.records
    table = np.frombuffer(bytearray(block.records), COLUMNS)
    table["kind"] = numbers[table["kind"]]
    return table.tobytes()


def _parsed_blocks(blocks: Iterator[Block], scratch: Path, size: int) -> Iterator[tuple[Block, ParsedBlock]]:
    """Every block with its result, in order; parsed here when there are few bytes, else by worker processes."""
    targets = (_line_file(scratch, number) for number in count())
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    if size < SERIAL_BYTES or workers < 2:
        yield from ((block, parse_block(block, target)) for block, target in zip(blocks, targets, strict=False))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _die_with, (os.getpid(),)) as pool:
        pending: deque[tuple[Block, Future[ParsedBlock]]] = deque()
        try:
            for block, target in zip(blocks, targets, strict=False):
                pending.append((block._replace(rows=b""), pool.submit(parse_block, block, target)))
                if len(pending) > workers + 2:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            for oldest, future in pending:
                yield oldest, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with(parent: int) -> None:
    """Ends a worker when the stage's process ends."""
    os.environ["STILLHOUSE_PARENT"] = str(parent)
    die_with_parent()


def _blocks(config: IngestConfig, paths: list[Path], names: list[str], shapes: dict[str, str]) -> Iterator[Block]:
    """The files' rows in blocks; a file's shape is put into `shapes` before its first block."""
    salt, learn_all = b"%d\n" % config.seed, config.learn_turns == "all"
    limits, bytes_before = ReadLimits(config.max_row_bytes, config.max_expansion), 0
    for file, (path, name) in enumerate(zip(paths, names, strict=True)):
        size = path.stat().st_size
        shapes[name] = _shape_of_file(config, path, name)
        row_format = RowFormat(shapes[name], config.system_prompt, salt, learn_all, frozenset(config.ignore_fields),
                               group_by=config.group_by, row_bytes=limits.row_bytes)  # fmt: skip
        if file_format(path) in JSON_SUFFIXES and is_json_lines(path, name, limits):
            for first_line, offset, data in line_blocks(path, name, BLOCK_BYTES, limits):
                lines = data if is_compressed(path) else FileRange(path, offset, len(data))
                yield Block(file, name, row_format, first_line, lines, bytes_before + min(offset, size))
        else:
            rows = read_file(path, name, limits)
            while batch := list(islice(rows, BLOCK_ROWS)):
                yield Block(file, name, row_format, batch[0][0], batch, bytes_before)
        bytes_before += size


def _shape_of_file(config: IngestConfig, path: Path, name: str) -> str:
    """The config's shape, or the one recognised by the file's first rows; BadData for a file without readable rows."""
    limits = ReadLimits(config.max_row_bytes, config.max_expansion)
    sample = list(islice(read_file(path, name, limits), SHAPE_SAMPLE))
    if not sample:
        raise BadData(f"{name} holds no rows; give a file with rows, or take it away")
    if config.format != "auto":
        return config.format
    values = [_value(data) for _, data in sample]
    if all(isinstance(value, UnreadableRow) for value in values):
        line, first = sample[0][0], cast(UnreadableRow, values[0])
        raise BadData(f"{name}: none of the first {len(sample)} rows can be read; line {line} is {first.reason}")
    return recognise_shape(values, name)


def _value(data: object) -> object:
    if not isinstance(data, bytes):
        return data
    try:
        return load_row(data)
    except ValueError as error:
        return UnreadableRow(str(error), "")


def canonical_lines(line_files: Iterable[Path]) -> Iterator[bytes]:
    """The canonical lines of the first pass, in order."""
    for path in line_files:
        with path.open("rb", buffering=1 << 20) as file:
            yield from file
