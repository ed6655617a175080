"""What a worker process does: a block of rows becomes canonical lines in a file, and packed numbers.

Parsing and writing JSON is orjson's work, row by row; this loop is most of the stage's time. It imports neither
Polars nor the stage's config, so that a worker starts at once.
"""

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.ingest.canonical import Canonical, Kind, Kinds, canonical, canonical_pair
from tasks.ingest.diagnose import what_is_wrong
from tasks.ingest.read import Numbered, Unreadable
from tasks.ingest.row_shapes import CONTROL_BYTES, FLAT, refuse_control_tokens, to_turns
from tasks.ingest.tables import dumps

# file, line, question, answer (both 64-bit hashes), kind, is it a JSON object, characters of both, bytes of the line
RECORD = struct.Struct("<HI8s8sIBIII")
PIECE_BYTES = 1 << 18


class Rules(NamedTuple):
    """What decides a row's canonical form."""

    shape: str
    system_prompt: str | None
    salt: bytes
    learn_all: bool


class Stretch(NamedTuple):
    """Bytes of a file, whole lines, for the worker to read itself."""

    path: Path
    start: int
    size: int


class Block(NamedTuple):
    """Rows of one file: its number, what reports call it, and `rows`: values, or JSON lines from line `first` on.

    `done` is how many bytes of all files were read before it, for the progress.
    """

    file: int
    name: str
    rules: Rules
    first: int
    rows: bytes | Stretch | list[Numbered]
    done: int = 0


class Done(NamedTuple):
    """`records` are `RECORD`s of the good rows, whose lines are in the block's file; kinds are numbered in `kinds`."""

    records: bytes
    kinds: list[Kind]
    quarantine: bytes
    faults: int


def batches(rows: bytes | Stretch | list[Numbered], first: int) -> Iterator[list[Numbered]]:
    """A block's rows with their line numbers, a few hundred kilobytes together: what is small stays in the cache."""
    if isinstance(rows, list):
        yield rows
        return
    with rows.path.open("rb") if isinstance(rows, Stretch) else BytesIO(rows) as file:
        left = rows.size if isinstance(rows, Stretch) else len(rows)
        file.seek(rows.start if isinstance(rows, Stretch) else 0)
        while left > 0:
            piece = file.read(min(PIECE_BYTES, left))
            piece += file.readline() if len(piece) < left else b""
            left -= len(piece)
            lines = piece.split(b"\n")
            yield [(number, line) for number, line in enumerate(lines, first) if line and not line.isspace()]
            first += len(lines) - 1


def stage_block(block: Block, staged: Path) -> Done:
    """Writes the good rows' canonical lines to `staged`."""
    rules, fields = block.rules, _pair_fields(block.rules)
    records: list[bytes] = []
    quarantine: list[bytes] = []
    kinds, pack, file = Kinds(), RECORD.pack, block.file
    with staged.open("wb") as out:
        for batch in batches(block.rows, block.first):
            lines: list[bytes] = []
            for number, data in batch:
                try:
                    line, question, answer, kind, asked, chars = _canonical(data, rules, fields)
                except orjson.JSONDecodeError:
                    quarantine.append(quarantined(block.name, number, what_is_wrong(_bytes(data)), data))
                except (ValueError, TypeError) as error:  # TypeError: orjson's, for half of a surrogate pair
                    quarantine.append(quarantined(block.name, number, str(error), data))
                else:
                    is_object = kind.signature is not None
                    place = kinds.number(kind) if is_object else 0
                    records.append(pack(file, number, question, answer, place, is_object, asked, chars, len(line)))
                    lines.append(line)
            out.write(b"".join(lines))
    return Done(b"".join(records), kinds.all, b"".join(quarantine), len(quarantine))


def _canonical(data: Any, rules: Rules, fields: tuple[str, str | None, str] | None) -> Canonical:
    if not isinstance(data, bytes):
        return _looked_at(data, rules)
    value = orjson.loads(data)
    found = canonical_pair(value, fields, rules.salt) if fields and not _is_suspect(data) else None
    return found or _looked_at(value, rules)


def _looked_at(value: Any, rules: Rules) -> Canonical:
    """Any row with all checks. Raises ValueError with what is wrong."""
    if type(value) is Unreadable:
        raise ValueError(value.reason)
    turns = to_turns(value, rules.shape, rules.system_prompt)
    found = canonical(turns, rules.salt, rules.learn_all)
    if b"<" in found[0] and CONTROL_BYTES.search(found[0]):
        refuse_control_tokens(turns)
    return found


def _pair_fields(rules: Rules) -> tuple[str, str | None, str] | None:
    """What `canonical_pair` takes, None where rows are no pairs or get a system message."""
    if rules.shape not in FLAT or rules.system_prompt:
        return None
    (first, *second), answer = FLAT[rules.shape]
    return first, second[0] if second else None, answer


def _is_suspect(line: bytes) -> bool:
    """Whether the JSON text may hold NUL, U+FFFD, half of a surrogate pair or a control token.

    Single bytes are asked for first: that search is ten times as fast as one for two.
    """
    if (b"\\" in line and b"\\u" in line) or (b"\xef" in line and b"\xef\xbf\xbd" in line):
        return True
    return b"<" in line and CONTROL_BYTES.search(line) is not None


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else b""


def quarantined(name: str, line: int, reason: str, data: Any) -> bytes:
    """One line of quarantine.jsonl; `raw` is the row as it was found."""
    if isinstance(data, bytes):
        raw = data.strip().decode(errors="backslashreplace")
    else:
        raw = data.raw if isinstance(data, Unreadable) else dumps(data)
    return orjson.dumps({"file": name, "line": line, "reason": reason, "raw": raw}) + b"\n"
