"""Parses a block of rows in a worker process: canonical lines go to a file, numbers about them to packed records.

Parsing and writing JSON is orjson's work, row by row; this loop is most of the stage's time. It imports neither
Polars nor the stage's config, so that a worker starts at once.
"""

import json
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.ingest.canonical import AnswerKind, AnswerKinds, CanonicalRow, canonical, canonical_pair
from tasks.ingest.json_errors import json_error_reason
from tasks.ingest.row_shapes import SHAPES, PairShape
from tasks.ingest.source_files import SourceRow, UnreadableRow
from tasks.ingest.turns import CONTROL_BYTES, refuse_control_tokens, to_turns

# file, line, question, answer (both 64-bit hashes), kind, is it a JSON object, characters of both, bytes of the line
RECORD = struct.Struct("<HI8s8sIBIII")
PIECE_BYTES = 1 << 18


class RowFormat(NamedTuple):
    """Settings that decide a row's canonical form."""

    shape: str
    system_prompt: str | None
    salt: bytes
    learn_all: bool


class FileRange(NamedTuple):
    """Whole lines of a file, as a range of bytes for the worker to read itself."""

    path: Path
    start: int
    size: int


class Block(NamedTuple):
    """Rows of one file: the file's number and name, and `rows`: values, or JSON lines from `first_line` on.

    `bytes_before` counts the bytes of all files before the block, for the progress.
    """

    file: int
    name: str
    row_format: RowFormat
    first_line: int
    rows: bytes | FileRange | list[SourceRow]
    bytes_before: int = 0


class ParsedBlock(NamedTuple):
    """`RECORD`s of the good rows, whose lines are in the block's file; the answers' kinds by number; the quarantine
    lines of the faulty rows, and their number."""

    records: bytes
    kinds: list[AnswerKind]
    quarantine: bytes
    faults: int


def row_batches(rows: bytes | FileRange | list[SourceRow], first_line: int) -> Iterator[list[SourceRow]]:
    """A block's rows with their line numbers, in batches of a few hundred kilobytes that fit the processor's cache."""
    if isinstance(rows, list):
        yield rows
        return
    with rows.path.open("rb") if isinstance(rows, FileRange) else BytesIO(rows) as file:
        remaining = rows.size if isinstance(rows, FileRange) else len(rows)
        file.seek(rows.start if isinstance(rows, FileRange) else 0)
        while remaining > 0:
            piece = file.read(min(PIECE_BYTES, remaining))
            piece += file.readline() if len(piece) < remaining else b""
            remaining -= len(piece)
            lines = piece.split(b"\n")
            yield [(number, line) for number, line in enumerate(lines, first_line) if line and not line.isspace()]
            first_line += len(lines) - 1


def parse_block(block: Block, target: Path) -> ParsedBlock:
    """Writes the good rows' canonical lines to `target`."""
    row_format, pair_shape = block.row_format, _pair_shape(block.row_format)
    records: list[bytes] = []
    quarantine: list[bytes] = []
    kinds, pack, file = AnswerKinds(), RECORD.pack, block.file
    with target.open("wb") as out:
        for batch in row_batches(block.rows, block.first_line):
            lines: list[bytes] = []
            for number, data in batch:
                try:
                    line, question, answer, kind, prompt_chars, chars = _canonical(data, row_format, pair_shape)
                except orjson.JSONDecodeError:
                    reason = json_error_reason(data if isinstance(data, bytes) else b"")
                    quarantine.append(quarantine_line(block.name, number, reason, data))
                except (ValueError, TypeError) as error:  # TypeError: orjson's, for half of a surrogate pair
                    quarantine.append(quarantine_line(block.name, number, str(error), data))
                else:
                    is_object = kind.signature is not None
                    index = kinds.number(kind) if is_object else 0
                    records.append(
                        pack(file, number, question, answer, index, is_object, prompt_chars, chars, len(line))
                    )
                    lines.append(line)
            out.write(b"".join(lines))
    return ParsedBlock(b"".join(records), kinds.all, b"".join(quarantine), len(quarantine))


def _canonical(data: Any, row_format: RowFormat, pair_shape: PairShape | None) -> CanonicalRow:
    if not isinstance(data, bytes):
        return _canonical_checked(data, row_format)
    value = orjson.loads(data)
    row = canonical_pair(value, pair_shape, row_format.salt) if pair_shape and not _is_suspect(data) else None
    return row or _canonical_checked(value, row_format)


def _canonical_checked(value: Any, row_format: RowFormat) -> CanonicalRow:
    """The canonical form of any row, after all checks. Raises ValueError with what is wrong."""
    if type(value) is UnreadableRow:
        raise ValueError(value.reason)
    turns = to_turns(value, row_format.shape, row_format.system_prompt)
    row = canonical(turns, row_format.salt, row_format.learn_all)
    line = row[0]
    if b"<" in line and CONTROL_BYTES.search(line):
        refuse_control_tokens(turns)
    return row


def _pair_shape(row_format: RowFormat) -> PairShape | None:
    """The shape for `canonical_pair`; None where rows are no pairs or get a system message."""
    shape = SHAPES[row_format.shape]
    return shape if isinstance(shape, PairShape) and not row_format.system_prompt else None


def _is_suspect(line: bytes) -> bool:
    """Whether the JSON text may hold NUL, U+FFFD, half of a surrogate pair or a control token.

    Single bytes are searched for first: that is ten times as fast as a search for two.
    """
    if (b"\\" in line and b"\\u" in line) or (b"\xef" in line and b"\xef\xbf\xbd" in line):
        return True
    return b"<" in line and CONTROL_BYTES.search(line) is not None


def quarantine_line(name: str, line: int, reason: str, data: Any) -> bytes:
    """A line of quarantine.jsonl; `raw` is the row as its file has it."""
    if isinstance(data, bytes):
        raw = data.strip().decode(errors="backslashreplace")
    elif isinstance(data, UnreadableRow):
        raw = data.raw
    else:
        raw = json.dumps(data, ensure_ascii=False, default=str)
    return orjson.dumps({"file": name, "line": line, "reason": reason, "raw": raw}) + b"\n"
