"""A user's data files: which ones a directory has, to which split each belongs, and how their bytes are opened.

A row that cannot be parsed is an `UnreadableRow` and does not stop the others; a file that cannot be read raises
BadData.
"""

import gzip
import io
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
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}  # of `save_to_disk`
HELPER_FILE = re.compile(r"(cache|indices|tmp)-.*\.arrow")  # results of `map` and `filter` beside a dataset
EXACT_NAME = re.compile(rf"({'|'.join(SPLIT_NAMES.values())})([-_.]?\d+(-of-\d+)?)?(\.\w+)*")


class UnreadableRow(NamedTuple):
    """A row that is no JSON value: the reason, and its text."""

    reason: str
    raw: str


class ReadLimits(NamedTuple):
    """Bounds for hostile or damaged files: bytes of a row, and how many times its size a file may be decompressed to
    (beyond `FREE_BYTES`)."""

    row_bytes: int = 16 << 20
    expansion: int = 200

    def too_long(self) -> str:
        """The reason for a row of more bytes."""
        return f"more than max_row_bytes={self.row_bytes} bytes; raise max_row_bytes, or take the row apart"


LIMITS = ReadLimits()
FREE_BYTES = 256 << 20

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
    is_data = path.name not in NOT_DATA and not HELPER_FILE.fullmatch(path.name)
    return data_suffix(path.name) if is_data else ""


def split_by_name(path: PurePath) -> Split:
    """The split of a file: test for `test.jsonl`, `test-00000-of-00001.parquet` and files below `test/`; else train."""
    for part in path.parts:
        for split, names in SPLIT_NAMES.items():
            if re.match(rf"({names})([-_.]|$)", part.lower()):
                return split
    return "train"


def is_exact_split_name(path: PurePath) -> bool:
    """Whether a file has its split by a name that says nothing else, as `test.jsonl` or `dev/` do and `dev-ops.jsonl`
    does not."""
    return any(EXACT_NAME.fullmatch(part.lower()) for part in path.parts)


def is_compressed(path: Path) -> bool:
    """Whether the file has to be decompressed."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_file(path: Path, name: str = "", limits: ReadLimits = LIMITS) -> IO[bytes]:
    """Opens the file's decompressed bytes. Reading raises BadData where they are too many for its size."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED_SUFFIXES:
        return path.open("rb", buffering=BUFFER_BYTES)
    if suffix == ".gz":
        raw = cast(IO[bytes], gzip.open(path, "rb"))  # noqa: SIM115  (closed with its wrapper)
    else:
        import pyarrow  # noqa: PLC0415  (0.2 s that other files do not need)

        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    bound = max(limits.expansion * path.stat().st_size, FREE_BYTES)
    return io.BufferedReader(_BoundedBytes(raw, bound, name or path.name, limits), BUFFER_BYTES)


class _BoundedBytes(io.RawIOBase):
    """Decompressed bytes, up to a bound."""

    def __init__(self, raw: IO[bytes], bound: int, name: str, limits: ReadLimits) -> None:
        self._raw, self._left, self._name, self._limits = raw, bound, name, limits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise BadData(
                f"{self._name} decompresses to more than {self._limits.expansion} times its size; if that is right, "
                "raise max_expansion or give it decompressed"
            )
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


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
    """Raises BadData for a file that begins as UTF-16 does, with its byte order mark or with every other byte zero."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadData(f"{name} is UTF-16 (byte 0xff at offset 0); save it as UTF-8: iconv -f utf-16 -t utf-8")
    for first, order in ((1, "le"), (0, "be")):
        if len(start) >= 8 and not any(start[first:40:2]) and all(start[1 - first : 40 : 2]):
            remedy = f"iconv -f utf-16{order} -t utf-8"
            raise BadData(f"{name} is UTF-16 (every other byte is zero); save it as UTF-8: {remedy}")
