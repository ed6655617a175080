"""Parses a block of rows in a worker process: canonical lines go to a file, numbers about them to packed records.

Parsing and writing JSON is orjson's work, row by row; this loop is most of the stage's time. It imports neither
Polars nor the stage's config, so that a worker starts at once.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.ingest.canonical import AnswerKind, AnswerKinds, CanonicalRow, canonical, canonical_pair
from tasks.ingest.comparison import GROUP, group_hash
from tasks.ingest.exact_json import load_row
from tasks.ingest.preference import PreferenceRow, preference_row
from tasks.ingest.row_fields import UnreadField, UnreadFields, is_empty, is_plain
from tasks.ingest.row_shapes import SHAPES, PairShape
from tasks.ingest.source_files import LIMITS, ReadLimits, SourceRow, UnreadableRow
from tasks.ingest.turns import CONTROL_BYTES, refuse_control_tokens, to_turns, up_to_last_label

# file, line, question, answer (both 64-bit hashes), kind, is it a JSON object, characters of both, bytes of the line,
# 32 bits of the hash of the question as it is written
RECORD = struct.Struct("<HI8s8sIBIII4s")
RELATION = struct.Struct("<IB8s")  # number of the row in its block, kind, hash
PIECE_BYTES = 1 << 18
RAW_BYTES = 1000  # of a row over the limit, for the quarantine


class RowFormat(NamedTuple):
    """Settings that decide a row's canonical form."""

    shape: str
    system_prompt: str | None
    salt: bytes
    learn_all: bool
    ignored: frozenset[str] = frozenset()
    row_bytes: int = LIMITS.row_bytes
    group_by: str | None = None


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
    lines of the faulty rows, and their number; preference rows with their line numbers; fields that were not read;
    `RELATION`s of the good rows that have some."""

    records: bytes
    kinds: list[AnswerKind]
    quarantine: bytes
    faults: int
    preferences: list[tuple[int, PreferenceRow]]
    unread: Mapping[str, UnreadField]
    relations: bytes


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
            piece += file.readline(remaining - len(piece)) if len(piece) < remaining else b""
            remaining -= len(piece)
            lines = piece.split(b"\n")
            yield [(number, line) for number, line in enumerate(lines, first_line) if line and not line.isspace()]
            first_line += len(lines) - 1


def parse_block(block: Block, target: Path) -> ParsedBlock:
    """Writes the good rows' canonical lines to `target`."""
    row_format, pair_shape = block.row_format, _pair_shape(block.row_format)
    records: list[bytes] = []
    quarantine: list[bytes] = []
    preferences: list[tuple[int, PreferenceRow]] = []
    unread: dict[str, Any] = {}  # of the row in hand
    unread_fields, relations = UnreadFields(), list[bytes]()
    kinds, pack, file = AnswerKinds(), RECORD.pack, block.file
    with target.open("wb") as out:
        for batch in row_batches(block.rows, block.first_line):
            lines: list[bytes] = []
            for number, data in batch:
                if unread:
                    unread.clear()
                try:
                    row = _canonical(data, row_format, pair_shape, unread)
                except (ValueError, TypeError) as error:  # TypeError: orjson's, for half of a surrogate pair
                    if isinstance(data, bytes) and len(data) > row_format.row_bytes:
                        data = data[:RAW_BYTES]
                    quarantine.append(quarantine_line(block.name, number, str(error), data))
                else:
                    if unread:
                        unread_fields.add(unread, f"{block.name}:{number}")
                    if isinstance(row, PreferenceRow):
                        preferences.append((number, row))
                        continue
                    line, question, answer, kind, prompt_chars, chars, written, related = row
                    for relation, digest in related:
                        relations.append(RELATION.pack(len(records), relation, digest))
                    is_object = kind.signature is not None
                    index = kinds.number(kind) if is_object else 0
                    records.append(
                        pack(file, number, question, answer, index, is_object, prompt_chars, chars, len(line), written)
                    )
                    lines.append(line)
            out.write(b"".join(lines))
    return ParsedBlock(
        records=b"".join(records),
        kinds=kinds.all,
        quarantine=b"".join(quarantine),
        faults=len(quarantine),
        preferences=preferences,
        unread=unread_fields.fields,
        relations=b"".join(relations),
    )


def _canonical(
    data: Any, row_format: RowFormat, pair_shape: PairShape | None, unread: dict[str, Any]
) -> CanonicalRow | PreferenceRow:
    """The canonical form of a row; fields that are not read are put into `unread`, with their values."""
    if not isinstance(data, bytes):
        return _canonical_checked(data, row_format, unread)
    if len(data) > row_format.row_bytes:
        raise ValueError(ReadLimits(row_format.row_bytes).too_long())
    value = load_row(data)
    if pair_shape and type(value) is dict and not _is_suspect(data):
        others = () if value.keys() <= pair_shape.names else is_plain(tuple(value), pair_shape.names)
        row = canonical_pair(value, pair_shape, row_format.salt) if others is not None else None
        if row:
            for name in others or ():
                if not is_empty(value[name]):
                    unread[name] = value[name]
            return row
    return _canonical_checked(value, row_format, unread)


def _canonical_checked(value: Any, row_format: RowFormat, unread: dict[str, Any]) -> CanonicalRow | PreferenceRow:
    """The canonical form of any row, after all checks. Raises ValueError with what is wrong."""
    if type(value) is UnreadableRow:
        raise ValueError(value.reason)
    shape, system_prompt, ignored = row_format.shape, row_format.system_prompt, row_format.ignored
    if isinstance(value, dict):
        preference = preference_row(value, shape, system_prompt, row_format.salt, ignored, unread)
        if preference:
            return preference
    turns = to_turns(value, shape, system_prompt, ignored, unread)
    if row_format.learn_all and not turns[-1][2]:
        turns = up_to_last_label(turns, unread)
    row = canonical(turns, row_format.salt, row_format.learn_all)
    line = row[0]
    if b"<" in line and CONTROL_BYTES.search(line):
        refuse_control_tokens(turns)
    if row_format.group_by:
        unread.pop(row_format.group_by, None)  # it is read
        return (*row[:-1], (*row[-1], (GROUP, group_hash(value, row_format.group_by, row_format.salt))))
    return row


def _pair_shape(row_format: RowFormat) -> PairShape | None:
    """The shape for `canonical_pair`; None where rows are no pairs, get a system message or have a group."""
    shape = SHAPES[row_format.shape]
    is_common = isinstance(shape, PairShape) and not row_format.system_prompt and not row_format.group_by
    return shape if is_common else None  # type: ignore[return-value]


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
    entry = {"file": _encodable(name), "line": line, "reason": _encodable(reason), "raw": _encodable(raw)}
    return orjson.dumps(entry) + b"\n"


def _encodable(text: str) -> str:
    """The text with halves of surrogate pairs, as bytes that are not UTF-8 become, written as escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
