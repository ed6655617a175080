"""Rows of CSV and Parquet files."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from tasks.core.errors import BadData
from tasks.ingest.source_files import SourceRow, UnreadableRow, open_file, refuse_utf16

BATCH_ROWS = 10_000
ERRORS = "surrogateescape"


def csv_rows(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of a CSV file as objects of strings; the delimiter is the header's most frequent of comma, `;`, tab, `|`."""
    csv.field_size_limit(1 << 30)
    with open_file(path) as file:
        refuse_utf16(file.peek(2)[:2] if hasattr(file, "peek") else b"", name)
        text = io.TextIOWrapper(file, "utf-8-sig", errors=ERRORS, newline="")
        head = text.readline()
        if not head.strip():
            raise BadData(f"{name} has no header; name its columns in the first line")
        delimiter = max(",;\t|", key=head.count)
        header = next(csv.reader([head], delimiter=delimiter))
        if len(set(header)) < len(header):
            repeated = next(field for field in header if header.count(field) > 1)
            raise BadData(f"{name}: the header names {repeated!r} twice; rename one of the columns")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            line = 2 + reader.line_num
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, UnreadableRow(f"not CSV: {error}; is a quote left open or not doubled?", "")
                if "unexpected end of data" in str(error):
                    return
                continue
            if fields:
                yield line, _object(header, fields, delimiter)


def _object(header: list[str], fields: list[str], delimiter: str) -> dict[str, str] | UnreadableRow:
    if len(fields) != len(header):
        reason = f"not CSV: {len(fields)} fields, not the header's {len(header)}; quote fields that hold a "
        return UnreadableRow(reason + repr(delimiter), _printable(delimiter.join(fields)))
    for field, value in zip(header, fields, strict=True):
        if not value.isascii() and not _is_utf8(value):
            byte = next(ord(char) - 0xDC00 for char in value if 0xDC80 <= ord(char) <= 0xDCFF)
            reason = f"not UTF-8: byte 0x{byte:02x} in field {field!r}; save the file as UTF-8"
            return UnreadableRow(reason, _printable(delimiter.join(fields)))
    return dict(zip(header, fields, strict=True))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors=ERRORS).decode(errors="backslashreplace")


def parquet_rows(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of a Parquet file as objects, a batch of them in memory at a time."""
    import polars  # noqa: PLC0415  (0.2 s that JSONL does not need)
    import pyarrow.parquet  # noqa: PLC0415

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS):
            frame = polars.DataFrame(polars.from_arrow(batch))
            for row in frame.iter_rows(named=True):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, polars.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise BadData(f"{name} is not Parquet, or damaged after row {number}: {error}") from error
