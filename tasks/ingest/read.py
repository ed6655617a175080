"""Reads a data file row by row: JSONL, JSON arrays, CSV, Parquet, plain, gzipped or zstd-compressed.

Memory is flat in the number of rows.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.ingest.json_arrays import array_rows
from tasks.ingest.json_lines import line_rows
from tasks.ingest.source_files import SourceRow, file_errors, file_format
from tasks.ingest.tables import csv_rows, parquet_rows

Reader = Callable[[Path, str], Iterator[SourceRow]]
READERS: dict[str, Reader] = {
    ".jsonl": line_rows,
    ".ndjson": line_rows,
    ".json": array_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}
"""The reader of each suffix of `tasks.core.data_files.DATA_SUFFIXES`."""


def read_file(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of one file, in order; `name` is the file's in messages."""
    with file_errors(path, name):
        yield from READERS[file_format(path)](path, name)
