"""Reads what people have, one row at a time: JSONL, JSON arrays, CSV, Parquet, plain, gzipped or zstd-compressed.

A row that cannot be read comes as `Unreadable` and does not stop the others; a whole file that cannot be read raises
BadData. Memory is flat in the number of rows.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, Literal, NamedTuple, cast

from tasks.core.errors import BadData

Split = Literal["train", "validation", "test"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
# The names that Hugging Face's `datasets` gives to splits, so that a copied hub dataset is read as it was meant.
SPLITS: dict[Split, str] = {"test": "test|testing|eval|evaluation", "validation": "validation|valid|val|dev"}
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}  # of `save_to_disk`


class Unreadable(NamedTuple):
    """A row that is no JSON value: why, and what was there."""

    reason: str
    raw: str


# A row's line (from 1; for Parquet: its row) and the row: JSON text, a value already parsed, or Unreadable.
Numbered = tuple[int, bytes | dict[Any, Any] | Unreadable]


def data_files(files: Path) -> tuple[list[tuple[Path, Split]], list[Path]]:
    """The data files of a directory (or the one file), each with its split by name, and the files passed over."""
    if not files.exists():
        raise BadData(f"{files} is not there; give a file or a directory with train.jsonl")
    found = [files] if files.is_file() else sorted(path for path in files.rglob("*") if path.is_file())
    root = files if files.is_dir() else files.parent
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    data = [path for path in visible if kind(path)]
    if not data:
        wanted = ", ".join(SUFFIXES)
        raise BadData(f"{files} holds no data file; give train.jsonl, or any of {wanted}, plain, .gz or .zst")
    return [(path, split_by_name(path.relative_to(root))) for path in data], [p for p in visible if not kind(p)]


def kind(path: PurePath) -> str:
    """The format suffix of a data file, without `.gz` or `.zst`; empty for any other file."""
    if path.name in NOT_DATA:
        return ""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return name.suffix.lower() if name.suffix.lower() in SUFFIXES else ""


def split_by_name(path: PurePath) -> Split:
    """A file below `test/`, `test.jsonl`, `test-00000-of-00001.parquet` are test; validation likewise; else train."""
    for part in path.parts:
        for split, names in SPLITS.items():
            if re.match(rf"({names})([-_.]|$)", part.lower()):
                return split
    return "train"


def read(path: Path, name: str) -> Iterator[Numbered]:
    """Rows of one file, in order; `name` is what errors call it."""
    from tasks.ingest import json_arrays, tables  # noqa: PLC0415  (they read through this module's `opened`)

    readers = {
        ".csv": tables.csv_rows,
        ".tsv": tables.csv_rows,
        ".parquet": tables.parquet_rows,
        ".json": json_arrays.rows,
    }
    with damage_told(path, name):
        yield from readers.get(kind(path), lines)(path, name)


@contextmanager
def damage_told(path: Path, name: str) -> Iterator[None]:
    """Errors of a file that cannot be read or decompressed become BadData."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{name} is a damaged gzip file ({error}); compress it anew") from error
    except PermissionError as error:
        raise BadData(f"{name} cannot be read: {error}") from error
    except OSError as error:
        if path.suffix.lower() != ".zst":
            raise
        raise BadData(f"{name} is a damaged zstd file ({error}); compress it anew") from error


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import io  # noqa: PLC0415

        import pyarrow  # noqa: PLC0415  (0.2 s that other files do not need)

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def is_lines(path: Path) -> bool:
    """Whether rows are lines by the file's name, so that `line_blocks` reads it."""
    return kind(path) in (".jsonl", ".ndjson")


def is_packed(path: Path) -> bool:
    """Whether the file has to be decompressed."""
    return path.suffix.lower() in PACKED


def lines(path: Path, name: str) -> Iterator[Numbered]:
    """JSON lines; empty ones do not count as rows."""
    for first, _, block in line_blocks(path, name, 1 << 18):
        for number, line in enumerate(block.split(b"\n"), first):
            if line and not line.isspace():
                yield number, line


def line_blocks(path: Path, name: str, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Whole lines of about `size` bytes together: the number of the first one, their place in the file, and they."""
    first, place = 1, 0
    with damage_told(path, name), opened(path) as file:
        while block := file.read(size):
            block += file.readline()
            if first == 1:
                refuse_utf16(block, name)
                place = len(BOM) if block.startswith(BOM) else 0
                block = block[place:]
            yield first, place, block
            first += block.count(b"\n")
            place += len(block)


def refuse_utf16(start: bytes, name: str) -> None:
    """Raises BadData for a file that begins as UTF-16 does."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadData(f"{name} is UTF-16 (byte 0xff at offset 0); save it as UTF-8: iconv -f utf-16 -t utf-8")
