"""What a worker process does: a block of rows becomes canonical lines in a file, and packed numbers.

Parsing and writing JSON is orjson's work, row by row; this loop is most of the stage's time. It imports neither
Polars nor the stage's config, so that a worker starts at once.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.ingest.canonical import Kind, Kinds, canonical
from tasks.ingest.diagnose import what_is_wrong
from tasks.ingest.read import Numbered, Unreadable
from tasks.ingest.shapes import CONTROL_BYTES, refuse_control_tokens, to_turns
from tasks.ingest.tables import dumps

# file, line, question, answer (both 64-bit hashes), kind, is it a JSON object, characters of both, bytes of the line
RECORD = struct.Struct("<HI8s8sIBIII")


class Rules(NamedTuple):
    """What decides a row's canonical form."""

    shape: str
    system_prompt: str | None
    salt: bytes
    learn_all: bool


class Block(NamedTuple):
    """Rows of one file: its number, what reports call it, and `rows`; bytes are JSON lines from line `first` on.

    `done` is how many bytes of all files were read before it, for the progress.
    """

    file: int
    name: str
    rules: Rules
    first: int
    rows: bytes | list[Numbered]
    done: int = 0


class Done(NamedTuple):
    """`records` are `RECORD`s of the good rows, whose lines are in the block's file; kinds are numbered in `kinds`."""

    records: bytes
    kinds: list[Kind]
    quarantine: bytes
    faults: int


def numbered(block: Block) -> Iterable[Numbered]:
    """The block's rows with their line numbers."""
    if isinstance(block.rows, bytes):
        return ((number, row) for number, row in enumerate(block.rows.split(b"\n"), block.first) if row.strip())
    return block.rows


def stage_block(block: Block, staged: Path) -> Done:
    """Writes the good rows' canonical lines to `staged`."""
    shape, system_prompt, salt, learn_all = block.rules
    lines: list[bytes] = []
    records: list[bytes] = []
    quarantine: list[bytes] = []
    kinds, pack, file = Kinds(), RECORD.pack, block.file
    for number, data in numbered(block):
        try:
            value = orjson.loads(data) if type(data) is bytes else data
            if type(value) is Unreadable:
                raise ValueError(value.reason)
            turns = to_turns(value, shape, system_prompt)
            line, question, answer, kind = canonical(turns, salt, learn_all)
            if b"<" in line and CONTROL_BYTES.search(line):
                refuse_control_tokens(turns)
        except orjson.JSONDecodeError:
            quarantine.append(quarantined(block.name, number, what_is_wrong(_bytes(data)), data))
        except (ValueError, TypeError) as error:  # TypeError: orjson's, for half of a surrogate pair in a string
            quarantine.append(quarantined(block.name, number, str(error), data))
        else:
            chars = len(turns[-1][1])
            asked = sum([len(turn[1]) for turn in turns]) - chars
            place = kinds.number(kind) if kind.signature is not None else 0
            records.append(
                pack(file, number, question, answer, place, kind.signature is not None, asked, chars, len(line))
            )
            lines.append(line)
    staged.write_bytes(b"".join(lines))
    return Done(b"".join(records), kinds.all, b"".join(quarantine), len(quarantine))


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else b""


def quarantined(name: str, line: int, reason: str, data: Any) -> bytes:
    """One line of quarantine.jsonl; `raw` is the row as it was found."""
    if isinstance(data, bytes):
        raw = data.strip().decode(errors="backslashreplace")
    else:
        raw = data.raw if isinstance(data, Unreadable) else dumps(data)
    return orjson.dumps({"file": name, "line": line, "reason": reason, "raw": raw}) + b"\n"
