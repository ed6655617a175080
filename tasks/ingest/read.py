"""Reads a data file row by row: JSONL and other JSON, CSV, Parquet, Arrow, plain, gzipped or zstd-compressed.

Memory is flat in the number of rows.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.ingest.json_arrays import json_rows
from tasks.ingest.row_shapes import SHAPES
from tasks.ingest.source_files import LIMITS, ReadLimits, SourceRow, file_errors, file_format, is_compressed
from tasks.ingest.tables import arrow_rows, csv_rows, parquet_rows

MAX_SETTINGS_BYTES = 1 << 20

Reader = Callable[[Path, str, ReadLimits], Iterator[SourceRow]]
READERS: dict[str, Reader] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
"""The reader of each suffix of `tasks.core.data_files.DATA_SUFFIXES`."""


def is_settings_file(path: Path) -> bool:
    """Whether a `.json` file holds one object that is no row, as `config.json` beside the data does."""
    if file_format(path) != ".json" or is_compressed(path) or path.stat().st_size > MAX_SETTINGS_BYTES:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or any(value.keys() >= set(shape.fields) for shape in SHAPES.values()):
        return False
    return not any(isinstance(field, list) and field and isinstance(field[0], dict) for field in value.values())


def read_file(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """Rows of one file, in order; `name` is the file's in messages."""
    with file_errors(path, name):
        yield from READERS[file_format(path)](path, name, limits)
