"""Rows of CSV and Parquet files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from tasks.core.errors import BadData
from tasks.ingest.read import Numbered, Unreadable, opened, refuse_utf16

BATCH = 10_000
ENCODING = "surrogateescape"


def csv_rows(path: Path, name: str) -> Iterator[Numbered]:
    """Rows as objects of strings. Comma, semicolon, tab or bar: what divides the header into most fields."""
    csv.field_size_limit(1 << 30)
    with opened(path) as file:
        refuse_utf16(file.peek(2)[:2] if hasattr(file, "peek") else b"", name)
        text = io.TextIOWrapper(file, "utf-8-sig", errors=ENCODING, newline="")
        head = text.readline()
        if not head.strip():
            raise BadData(f"{name} has no header; name its columns in the first line")
        delimiter = max(",;\t|", key=head.count)
        header = next(csv.reader([head], delimiter=delimiter))
        if len(set(header)) < len(header):
            twice = next(field for field in header if header.count(field) > 1)
            raise BadData(f"{name}: the header names {twice!r} twice; rename one of the columns")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            line = 2 + reader.line_num
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Unreadable(f"not CSV: {error}; is a quote left open or not doubled?", "")
                if "unexpected end of data" in str(error):
                    return
                continue
            if fields:
                yield line, _row(header, fields, delimiter)


def _row(header: list[str], fields: list[str], delimiter: str) -> dict[str, str] | Unreadable:
    if len(fields) != len(header):
        reason = f"not CSV: {len(fields)} fields, not the header's {len(header)}; quote fields that hold a "
        return Unreadable(reason + repr(delimiter), _shown(delimiter.join(fields)))
    for field, value in zip(header, fields, strict=True):
        if not value.isascii() and not _is_utf8(value):
            byte = next(ord(char) - 0xDC00 for char in value if 0xDC80 <= ord(char) <= 0xDCFF)
            reason = f"not UTF-8: byte 0x{byte:02x} in field {field!r}; save the file as UTF-8"
            return Unreadable(reason, _shown(delimiter.join(fields)))
    return dict(zip(header, fields, strict=True))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return text.encode(errors=ENCODING).decode(errors="backslashreplace")


def parquet_rows(path: Path, name: str) -> Iterator[Numbered]:
    """Rows as objects, a batch of them in memory at a time."""
    import polars  # noqa: PLC0415  (0.2 s that JSONL does not need)
    import pyarrow.parquet  # noqa: PLC0415

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH):
            frame = polars.DataFrame(polars.from_arrow(batch))
            for row in frame.iter_rows(named=True):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, polars.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise BadData(f"{name} is not Parquet, or damaged after row {number}: {error}") from error


def dumps(value: object) -> str:
    """A row of a table as it is shown in the quarantine."""
    return json.dumps(value, ensure_ascii=False, default=str)
