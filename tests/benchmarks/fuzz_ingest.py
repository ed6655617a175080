"""Damages small files at random and counts what ingest's readers make of their rows.

python -m tests.benchmarks.fuzz_ingest --inputs 100000 --seed 0

Every row carries a mark. For each file: nothing raises but the refusal of a whole file; every mark is in a good row or
in the quarantine (counted here, in the files and in the output); rows that were not damaged are read word for word.
The last line is a summary.
"""

import argparse
import csv
import gzip
import io
import json
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import orjson

from tasks.core.errors import BadData
from tasks.ingest.block_parser import Block, RowFormat, parse_block
from tasks.ingest.json_arrays import is_json_lines
from tasks.ingest.json_lines import line_blocks
from tasks.ingest.read import read_file
from tasks.ingest.source_files import JSON_SUFFIXES, file_format

MARK = re.compile(rb"mark[0-9]{6}x")
TEXTS = (
    "Why?",
    "a \\ b",
    'say "hi"',
    "ü ß 漢字 😀",
    "line\nbreak",
    "tab\t.",
    "{curly}",
    "[1, 2",
    "a,b;c",
    "1e400",
    "a\u2028b",
)
ANSWERS = ('{"intent": "x", "n": 1.10}', '{"a": {"b": [1, 2]}}', "plain", "12", '{"id": 12345678901234567890123}')
VALUES = (b"1e400", b"-1e999", b"9" * 5000, b"12345678901234567890123", b"1.10", b"NaN", b"[" * 2000, b"[" * 100000,
          b'{"a":' * 3000, b'"\\ud800"', b"null", b"true", b"-0", b"1E5", b'{"a":1,"a":2}', b"[]", b"'x'")  # fmt: skip
NOISE = (b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\x00", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\t", b"\r",
         b"'", b"//", b"\xed\xa0\x80", b"\xf0\x9f", b"<eos>", b" ", b"\\u0000", b"\\ud83d", b"\x1a", b"\x85",
         b"\xc2\xa0")  # fmt: skip


class File(NamedTuple):
    """A damaged file: its suffix and bytes, the marks of its rows, the texts of the rows that are whole, and the number
    of rows that a plain count of it gives (None where damage decides)."""

    suffix: str
    data: bytes
    marks: set[bytes]
    whole: list[tuple[str, str]]
    rows: int | None


def damaged(row: bytes, random: Random) -> bytes:
    """The row with one to three faults; its mark stays."""
    mark = MARK.search(row)
    assert mark
    before, behind = row[: mark.start()], row[mark.end() :]
    for _ in range(random.randint(1, 3)):
        behind = _spoilt(behind, random)
        if random.random() < 0.3:
            before = _spoilt(before, random)
    return before + mark[0] + behind


def _spoilt(text: bytes, random: Random) -> bytes:
    at, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    kind = random.randrange(7)
    if kind == 0:
        return text[:at] + random.choice(NOISE) + text[at:]
    if kind == 1:
        return text[:at] + text[min(end, at + 8) :]
    if kind == 2:
        return text[:at]
    if kind == 3:
        return text[:at] + random.randbytes(random.randint(1, 4)).replace(b"\n", b"") + text[at:]
    if kind == 4:
        colon = text.rfind(b":")
        return text[: colon + 1] + random.choice(VALUES) + b"}" if colon >= 0 else text
    if kind == 5 and text.endswith(b"}"):
        return text[:-1] + b', "extra": ' + random.choice(VALUES) + b"}"
    return text[:at] + text[at:end] * 2 + text[end:]


def made(random: Random) -> File:
    """One file of a random format, with none to two damaged rows."""
    count = random.randint(2, 6)
    pairs = [
        (f"mark{random.randrange(10**6):06}x {random.choice(TEXTS)}", random.choice((*TEXTS, *ANSWERS)))
        for _ in range(count)
    ]
    pairs = list({question[:11]: (question, answer) for question, answer in pairs}.values())
    marks = {question[:11].encode() for question, _ in pairs}
    spoilt = set(random.sample(range(len(pairs)), random.choice((0, 1, 1, 1, 2)) % (len(pairs) + 1)))
    whole = [pair for number, pair in enumerate(pairs) if number not in spoilt]
    layout = random.choice(LAYOUTS)
    suffix, data, rows = layout(pairs, spoilt, random)
    if random.random() < 0.1 and suffix != ".parquet":
        suffix, data = suffix + ".gz", gzip.compress(data, 1)
    return File(suffix, data, marks, whole, rows)


Made = tuple[str, bytes, int | None]


def _json_rows(
    pairs: list[tuple[str, str]], spoilt: set[int], random: Random, indent: int | None = None
) -> list[bytes]:
    is_ascii = random.random() < 0.5
    rows = [
        json.dumps({"question": question, "answer": answer}, ensure_ascii=is_ascii, indent=indent).encode()
        for question, answer in pairs
    ]
    return [damaged(row, random) if number in spoilt else row for number, row in enumerate(rows)]


def _lines(pairs: list[tuple[str, str]], spoilt: set[int], random: Random) -> Made:
    rows = _json_rows(pairs, spoilt, random)
    first = rows[0].lstrip(b"\xef\xbb\xbf \t\r\x0b\x0c")
    if not first.startswith(b"{") or not first.rstrip().endswith(b"}"):
        rows.insert(0, b'{"question": "first", "answer": "first"}')  # the first line decides how a file is read
    ends = b"\r\n" if random.random() < 0.2 else b",\n" if random.random() < 0.1 else b"\n"
    data = ends.join(rows) + random.choice((b"", ends, b"\n\n"))
    plain = [line for line in data.split(b"\n") if line.strip()]
    return random.choice((".jsonl", ".ndjson", ".json")), data, len(plain)


def _array(pairs: list[tuple[str, str]], spoilt: set[int], random: Random) -> Made:
    indent = random.choice((None, None, 1))
    rows = _json_rows(pairs, spoilt, random, indent)
    comma = random.choice((b", ", b",\n", b",\n  ", b" ,\n"))
    half = random.randrange(len(rows) + 1)
    opening, closing = random.choice(((b"[", b"]"), (b"[\n", b"\n]\n"), (b"[", b",]"), (b" \n[ ", b" ]")))
    if random.random() < 0.2 and not spoilt and 0 < half < len(rows):
        data = opening + comma.join(rows[:half]) + closing + opening + comma.join(rows[half:]) + closing
    elif random.random() < 0.3 and 0 not in spoilt:
        data = b'{"data": ' + opening + comma.join(rows) + closing + b"}"
    else:
        data = opening + comma.join(rows) + closing
    return random.choice((".json", ".jsonl")), data, len(rows) if not spoilt else None


def _pretty(pairs: list[tuple[str, str]], spoilt: set[int], random: Random) -> Made:
    rows = _json_rows(pairs, spoilt - {0}, random, indent=2)
    return random.choice((".json", ".jsonl")), b"\n".join(rows), len(rows) if not spoilt - {0} else None


def _table(pairs: list[tuple[str, str]], spoilt: set[int], random: Random) -> Made:
    delimiter = random.choice(",;\t|")
    rows = []
    for number, pair in enumerate(pairs):
        out = io.StringIO()
        quoting = random.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
        csv.writer(out, delimiter=delimiter, lineterminator="\r\n", quoting=quoting).writerow(pair)
        row = out.getvalue().removesuffix("\r\n").encode()
        rows.append(damaged(row, random) if number in spoilt else row)
    head = random.choice((b"", b"", f"sep={delimiter}\n".encode()))
    head += (
        random.choice(("question{}answer", " Question {} Answer", '"question"{}"answer"')).format(delimiter).encode()
    )
    end = random.choice((b"\n", b"\r\n"))
    return random.choice((".csv", ".tsv")), end.join([head, *rows]), len(rows) if not spoilt else None


LAYOUTS: tuple[Callable[[list[tuple[str, str]], set[int], Random], Made], ...] = (
    _lines,
    _lines,
    _array,
    _pretty,
    _table,
)


class Read(NamedTuple):
    """What the readers made of a file: its good rows' lines, the quarantine's entries, or the refusal of all of it."""

    good: list[bytes]
    quarantine: list[dict[str, Any]]
    refusal: str


def read(path: Path, target: Path) -> Read:
    """Reads a file as the first pass does."""
    good: list[bytes] = []
    quarantine: list[dict[str, Any]] = []
    row_format = RowFormat("question_answer", None, b"0\n", True)
    try:
        if file_format(path) in JSON_SUFFIXES and is_json_lines(path, path.name):
            blocks = [(first, data) for first, _, data in line_blocks(path, path.name, 1 << 20)]
        else:
            rows: Any = list(read_file(path, path.name))
            blocks = [(1, rows)]
        for first_line, data in blocks:
            block = Block(0, path.name, row_format, first_line, data)
            parsed = parse_block(block, target)
            good += target.read_bytes().splitlines(keepends=False) if target.stat().st_size else []
            lines = [orjson.loads(line) for line in parsed.quarantine.splitlines()]
            assert len(lines) == parsed.faults
            quarantine += lines
    except BadData as error:
        return Read([], [], str(error))
    return Read(good, quarantine, "")


def faults_of(file: File, result: Read) -> list[str]:
    """What is wrong with the reading; empty where all rows are accounted for."""
    if result.refusal:
        return []
    good = [orjson.loads(line) for line in result.good]
    texts = Counter((row["messages"][0]["content"], row["messages"][1]["content"]) for row in good)
    raws = b"\n".join(entry["raw"].encode() for entry in result.quarantine)
    seen = set(MARK.findall(b"\n".join(result.good) + b"\n" + raws))
    faults = [f"lost: {mark.decode()}" for mark in file.marks - seen]
    faults += [f"not read word for word: {pair}" for pair in file.whole if not texts[pair]]
    if file.rows is not None and len(good) + len(result.quarantine) != file.rows:
        faults.append(f"{len(good)} read and {len(result.quarantine)} quarantined of {file.rows}")
    if any(not entry["reason"] for entry in result.quarantine):
        faults.append("no reason")
    return faults


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write files with a fault to this directory")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.inputs):
            file = made(Random(arguments.seed * 10**9 + number))
            path = Path(directory) / f"rows{file.suffix}"
            path.write_bytes(file.data)
            try:
                result = read(path, Path(directory) / "lines")
                faults = faults_of(file, result)
            except Exception:  # noqa: BLE001  (a crash is what it looks for)
                result, faults = Read([], [], "crash"), ["crash: " + traceback.format_exc(limit=-3)]
            counts["rows"] += len(file.marks)
            counts["read"] += len(result.good)
            counts["quarantined"] += len(result.quarantine)
            counts["files refused"] += bool(result.refusal)
            counts["crashes"] += result.refusal == "crash"
            counts["files with a fault"] += bool(faults)
            if faults:
                sys.stdout.write(f"input {number} ({file.suffix}): {'; '.join(faults[:3])}\n")
                if arguments.keep:
                    arguments.keep.mkdir(exist_ok=True)
                    (arguments.keep / f"{number}{file.suffix}").write_bytes(file.data)
            path.unlink()
    seconds = time.monotonic() - begin
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    sys.stdout.write(f"{arguments.inputs} inputs, seed {arguments.seed}, {seconds:.0f} s: {told}\n")
    sys.exit(bool(counts["files with a fault"]))


if __name__ == "__main__":
    main()
