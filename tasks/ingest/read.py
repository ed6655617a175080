"""Reads what people have, one record at a time: JSONL, JSON arrays, CSV, Parquet, plain or gzipped.

A record that cannot be read comes with its `fault` in words and does not stop the others; a whole file that cannot be
read raises BadData.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import orjson

from tasks.core.errors import BadData

Split = Literal["train", "validation", "test"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# The names that Hugging Face's `datasets` gives to splits, so that a copied hub dataset is read as it was meant.
SPLITS: dict[Split, str] = {"test": "test|testing|eval|evaluation", "validation": "validation|valid|val|dev"}
BATCH = 10_000


class Record(NamedTuple):
    """One row as found: `line` counts from 1 (for Parquet: rows); `value` is None when there is a `fault`."""

    file: str
    line: int
    raw: str
    value: Any
    fault: str | None = None


def data_files(files: Path) -> tuple[list[tuple[Path, Split]], list[Path]]:
    """The data files of a directory (or the one file), each with its split by name, and the files passed over."""
    if not files.exists():
        raise BadData(f"{files} is not there; give a file or a directory with train.jsonl")
    found = [files] if files.is_file() else sorted(path for path in files.rglob("*") if path.is_file())
    visible = [path for path in found if not path.name.startswith(".")]
    data = [path for path in visible if kind(path)]
    if not data:
        raise BadData(f"{files} holds no data file; give train.jsonl, or any of {', '.join(SUFFIXES)}, plain or .gz")
    return [(path, split_by_name(path)) for path in data], [path for path in visible if not kind(path)]


def kind(path: Path) -> str:
    """The format suffix of a data file, without `.gz`; empty for any other file."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def split_by_name(path: Path) -> Split:
    """`test.jsonl`, `test-00000-of-00001.parquet` are test; the same for validation; all others are train."""
    for split, names in SPLITS.items():
        if re.match(rf"({names})([-_.]|$)", path.name.lower()):
            return split
    return "train"


def read(path: Path, name: str) -> Iterator[Record]:
    """Records of one file, in order; `name` is what reports call it. Memory is flat except for JSON arrays."""
    try:
        yield from _READERS[kind(path)](path, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{name} is a damaged gzip file ({error}); compress it anew") from error
    except PermissionError as error:
        raise BadData(f"{name} cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path, name: str) -> Iterator[Record]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number == 1:
                _refuse_utf16(line, name)
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.strip()
            if line:
                yield _parsed(line, name, number, start)


def _parsed(line: bytes, name: str, number: int, offset: int) -> Record:
    try:
        return Record(name, number, line.decode(), orjson.loads(line))
    except UnicodeDecodeError as error:
        at, byte = offset + error.start, line[error.start]
        fault = f"not UTF-8: byte 0x{byte:02x} at offset {at} of the file; save it as UTF-8"
        return Record(name, number, line.decode(errors="backslashreplace"), None, fault)
    except orjson.JSONDecodeError as error:
        return Record(name, number, line.decode(), None, f"not JSON: {error}")


def _json(path: Path, name: str) -> Iterator[Record]:
    """A JSON array (or one object, or JSONL by another name); a broken element ends it, as nothing marks the next."""
    with _open(path) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"["):
        yield from _jsonl(path, name)
        return
    with _open(path) as file:
        data = file.read()
    _refuse_utf16(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from error
    yield from _elements(text, name)


def _elements(text: str, name: str) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = gap.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except ValueError as error:
            yield Record(name, line, text[position : position + 200], None, f"not JSON, nor is what follows: {error}")
            return
        yield _parsed(text[position:end].encode(), name, line, position)
        position = end


def _csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            for row in reader:
                yield Record(name, reader.line_num, json.dumps(row, ensure_ascii=False), row)
        except UnicodeDecodeError as error:
            raise BadData(
                f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} after line {reader.line_num}; "
                "save it as UTF-8"
            ) from error
        except csv.Error as error:
            raise BadData(f"{name} is not CSV at line {reader.line_num}: {error}") from error


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import polars  # noqa: PLC0415  (150 ms that JSONL does not need)

    try:
        frame = polars.scan_parquet(path)
        count = frame.select(polars.len()).collect().item()
        for start in range(0, count, BATCH):
            for number, row in enumerate(frame.slice(start, BATCH).collect().iter_rows(named=True), start=start + 1):
                yield Record(name, number, json.dumps(row, ensure_ascii=False, default=str), row)
    except polars.exceptions.PolarsError as error:
        raise BadData(f"{name} is not Parquet: {error}") from error


def _refuse_utf16(start: bytes, name: str) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadData(f"{name} is UTF-16 (byte 0xff at offset 0); save it as UTF-8: iconv -f utf-16 -t utf-8")


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
