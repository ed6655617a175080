"""A user's data files: which ones a directory has, to which split each belongs, and how their bytes are opened.

A row that cannot be parsed is an `UnreadableRow` and does not stop the others; a file that cannot be read raises
BadData.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, Literal, NamedTuple, cast

from tasks.core.data_files import COMPRESSED_SUFFIXES, DATA_SUFFIXES, data_suffix
from tasks.core.errors import BadData

Split = Literal["train", "validation", "test"]

BOM = b"\xef\xbb\xbf"
BUFFER_BYTES = 1 << 20
# The names that Hugging Face's `datasets` gives to splits, so that a copied hub dataset is read as it was meant.
SPLIT_NAMES: dict[Split, str] = {"test": "test|testing|eval|evaluation", "validation": "validation|valid|val|dev"}
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}  # of `save_to_disk`


class UnreadableRow(NamedTuple):
    """A row that is no JSON value: the reason, and its text."""

    reason: str
    raw: str


SourceRow = tuple[int, bytes | dict[Any, Any] | UnreadableRow]
"""A row's line (from 1; for Parquet: its row) and the row: JSON text, a parsed value, or an UnreadableRow."""


def data_files(files: Path) -> tuple[list[tuple[Path, Split]], list[Path]]:
    """The data files of a directory (or the one file), each with its split by name, and the files without data."""
    if not files.exists():
        raise BadData(f"{files} is not there; give a file or a directory with train.jsonl")
    paths = [files] if files.is_file() else sorted(path for path in files.rglob("*") if path.is_file())
    root = files if files.is_dir() else files.parent
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    data = [path for path in visible if file_format(path)]
    if not data:
        formats = ", ".join(DATA_SUFFIXES)
        raise BadData(f"{files} holds no data file; give train.jsonl, or any of {formats}, plain, .gz or .zst")
    skipped = [path for path in visible if not file_format(path)]
    return [(path, split_by_name(path.relative_to(root))) for path in data], skipped


def file_format(path: PurePath) -> str:
    """The format suffix of a data file, without `.gz` or `.zst`; empty for any other file."""
    return "" if path.name in NOT_DATA else data_suffix(path.name)


def split_by_name(path: PurePath) -> Split:
    """The split of a file: test for `test.jsonl`, `test-00000-of-00001.parquet` and files below `test/`; else train."""
    for part in path.parts:
        for split, names in SPLIT_NAMES.items():
            if re.match(rf"({names})([-_.]|$)", part.lower()):
                return split
    return "train"


def is_compressed(path: Path) -> bool:
    """Whether the file has to be decompressed."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_file(path: Path) -> IO[bytes]:
    """Opens the file's decompressed bytes."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import io  # noqa: PLC0415

        import pyarrow  # noqa: PLC0415  (0.2 s that other files do not need)

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), BUFFER_BYTES)
    return path.open("rb", buffering=BUFFER_BYTES)


@contextmanager
def file_errors(path: Path, name: str) -> Iterator[None]:
    """Turns errors of a file that cannot be read or decompressed into BadData; `name` is the file's in messages."""
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


def refuse_utf16(start: bytes, name: str) -> None:
    """Raises BadData for a file that begins as UTF-16 does."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadData(f"{name} is UTF-16 (byte 0xff at offset 0); save it as UTF-8: iconv -f utf-16 -t utf-8")
