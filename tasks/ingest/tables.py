"""Rows of CSV, Parquet and Arrow files."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import BadData
from tasks.ingest.row_shapes import SHAPES
from tasks.ingest.source_files import LIMITS, ReadLimits, SourceRow, UnreadableRow, open_file, refuse_utf16

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 10_000
BATCH_BYTES = 64 << 20
ERRORS = "surrogateescape"
SEPARATOR_LINE = re.compile(r"sep=(.)\s*")
QUOTED = re.compile(r'"[^"]*"')
FIELDS = frozenset(field for shape in SHAPES.values() for field in shape.fields)


def csv_rows(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """Rows of a CSV file as objects of strings.

    The delimiter is the one of a first line `sep=;`, else the header's most frequent of comma, `;`, tab, `|` outside
    of quotes. A row that is not CSV ends at its first line's end, so that the lines after it are read.
    """
    csv.field_size_limit(min(limits.row_bytes, (1 << 31) - 1))
    with open_file(path, name, limits) as file:
        refuse_utf16(file.peek(40)[:40] if hasattr(file, "peek") else b"", name)
        lines = _Lines(io.TextIOWrapper(file, "utf-8-sig", errors=ERRORS, newline=""), limits.row_bytes)
        head = next(lines, "")
        separator = SEPARATOR_LINE.fullmatch(head)
        if separator:
            head = next(lines, "")
        if not head.strip():
            raise BadData(f"{name} has no header; name its columns in the first line")
        delimiter = separator[1] if separator else max(",;\t|", key=QUOTED.sub("", head).count)
        header = column_names(next(csv.reader([head], delimiter=delimiter)))
        columns = len(header)
        while columns > 1 and not header[columns - 1]:
            columns -= 1  # delimiters at the line's end, as spreadsheets write them
        if len(set(header[:columns])) < columns:
            repeated = next(field for field in header if header.count(field) > 1)
            raise BadData(f"{name}: the header names {repeated!r} twice; rename one of the columns")
        yield from _csv_records(lines, header, columns, delimiter, limits)


def column_names(header: list[str]) -> list[str]:
    """A header's names without spaces around them; in small letters where that makes them fields of a known shape."""
    names = [name.strip() for name in header]
    small = [name.lower() if name.lower() in FIELDS else name for name in names]
    return small if len(set(small)) == len(set(header)) else names


class _Lines:
    """A file's lines with their number; lines can be put back. Of a line over the limit only the beginning is kept."""

    def __init__(self, text: io.TextIOWrapper, limit: int) -> None:
        self._text, self._limit, self._returned = text, limit, list[str]()
        self.number = 0
        self.record: list[str] = []
        """The lines of the record that is being read."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else self._read()
        if not line or sum(map(len, self.record)) > self._limit:
            if line:
                self._returned.append(line)
            raise StopIteration
        self.number += 1
        self.record.append(line)
        return line

    def _read(self) -> str:
        line = self._text.readline(self._limit + 1)
        if len(line) > self._limit and not line.endswith(("\n", "\r")):
            while (piece := self._text.readline(1 << 20)) and not piece.endswith(("\n", "\r")):
                pass
        return line

    def put_back(self) -> str:
        """Returns the record's first line, and puts the others back."""
        first, *others = self.record
        self._returned += reversed(others)
        self.number -= len(others)
        return first


def _csv_records(
    lines: _Lines, header: list[str], columns: int, delimiter: str, limits: ReadLimits
) -> Iterator[SourceRow]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.record.clear()
        line = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first = lines.put_back()
            is_long = len(first) > limits.row_bytes or "field limit" in str(error)
            reason = limits.too_long() if is_long else f"not CSV: {error}; is a quote left open or not doubled?"
            yield line, UnreadableRow(reason, _printable(first[:1000] if is_long else first.rstrip("\r\n")))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            continue
        if sum(map(len, fields)) > limits.row_bytes:
            yield line, UnreadableRow(limits.too_long(), _printable(delimiter.join(fields)[:1000]))
        elif fields and len(fields) > columns and _holds_rows(lines.record, columns, delimiter):
            reason = (
                f"not CSV: its quote is closed {len(lines.record) - 1} lines later, in another row; double the quote"
            )
            yield line, UnreadableRow(reason, _printable(lines.put_back().rstrip("\r\n")))
        elif fields:
            while len(fields) > columns and not fields[-1]:
                fields.pop()
            yield line, _object(header[:columns], fields, delimiter)


def _holds_rows(record: list[str], columns: int, delimiter: str) -> bool:
    """Whether the lines within a record are rows themselves, so that a quote too many hides their ends."""
    inner = record[1:-1]
    return bool(inner) and all(
        len(fields) == columns for fields in csv.reader((line for line in inner), delimiter=delimiter)
    )


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


def parquet_rows(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """Rows of a Parquet file as objects, a batch of them in memory at a time."""
    import pyarrow.parquet  # noqa: PLC0415  (0.2 s that JSONL does not need)

    def batches() -> "Iterator[pyarrow.RecordBatch]":
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            row_bytes = metadata.total_byte_size // max(metadata.num_rows, 1) + 1
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
            yield from file.iter_batches(rows, row_groups=[group])

    yield from _batch_rows(batches(), f"{name} is not Parquet, or damaged", limits)


def arrow_rows(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """Rows of an Arrow file: a stream, as `save_to_disk` of `datasets` writes it, or with a footer (Feather)."""
    import pyarrow  # noqa: PLC0415  (0.2 s that JSONL does not need)

    def batches() -> "Iterator[pyarrow.RecordBatch]":
        with open_file(path, name, limits) as file:
            has_footer = file.peek(6)[:6] == b"ARROW1" if hasattr(file, "peek") else False
            if not has_footer:
                yield from pyarrow.ipc.open_stream(file)
                return
        reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))
        yield from map(reader.get_batch, range(reader.num_record_batches))

    yield from _batch_rows(batches(), f"{name} is not Arrow, or damaged", limits)


def _batch_rows(batches: "Iterator[pyarrow.RecordBatch]", message: str, limits: ReadLimits) -> Iterator[SourceRow]:
    import pyarrow  # noqa: PLC0415

    from tasks.ingest.arrow_values import column_values  # noqa: PLC0415

    number = 0
    try:
        for batch in batches:
            names = column_names(batch.schema.names)
            columns = [column_values(batch, index) for index in range(batch.num_columns)]
            may_be_long = batch.nbytes > limits.row_bytes
            for values in zip(*columns, strict=True):
                number += 1
                if may_be_long and _characters(values) > limits.row_bytes:
                    yield number, UnreadableRow(limits.too_long(), "")
                else:
                    yield number, dict(zip(names, values, strict=True))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise BadData(f"{message} after row {number}: {error}") from error


def _characters(values: tuple[Any, ...]) -> int:
    """About how many characters a row has."""
    return sum(len(value) if isinstance(value, (str, bytes)) else len(repr(value)) for value in values)
