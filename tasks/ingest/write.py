"""Second pass: copies canonical lines to their splits, or to quarantine with the reason."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import orjson
import polars as pl
from numpy.typing import NDArray

from tasks.core.job import Job
from tasks.ingest.first_pass import ParsedRows
from tasks.ingest.profile import SPLITS
from tasks.ingest.reasons import QuarantineReasons
from tasks.ingest.row_selection import Selection

REPORT_BYTES = 4_000_000
QUARANTINED, CUT = len(SPLITS), len(SPLITS) + 1  # a row's code is its split's index in SPLITS, or one of these


class LineBlock(NamedTuple):
    """Canonical lines of consecutive rows: the first row's number, and where each line starts and ends in `data`."""

    first: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    data: memoryview

    def line(self, row: int) -> memoryview:
        """The line of a row's number, with its line break."""
        return self.data[self.starts[row - self.first] : self.ends[row - self.first]]


def write_splits(
    parsed: ParsedRows, selection: Selection, reasons: QuarantineReasons, out: Path, quarantine: IO[bytes], job: Job
) -> None:
    """Writes train, validation, test and calibration.jsonl; `reasons` says why a row is not good.

    Consecutive rows of one split are copied together, without a look at their lines.
    """
    codes, total = _codes(selection.good, parsed.rows.height), parsed.rows.height
    split_of_cut = {row: int(codes[row]) for row in selection.cut}
    codes[list(selection.cut)] = CUT
    calibration: list[bytes] = [b""] * len(selection.calibration)
    calibration_rows = np.array(sorted(selection.calibration), dtype=np.int64)
    with ExitStack() as stack:
        files = [stack.enter_context((out / f"{name}.jsonl").open("wb")) for name in SPLITS]
        for number, block in enumerate(_line_blocks(parsed)):
            pieces: list[list[bytes | memoryview]] = [[] for _ in SPLITS]
            end = block.first + len(block.ends)
            for start, stop, code in _runs(codes[block.first : end]):
                if code < QUARANTINED:
                    pieces[code].append(block.data[block.starts[start] : block.ends[stop - 1]])
                    continue
                for row in range(block.first + start, block.first + stop):
                    if code == CUT:
                        pieces[split_of_cut[row]].append(selection.cut[row].line + b"\n")
                    else:
                        quarantine.write(reasons.quarantine_line(row, bytes(block.line(row)[:-1])))
            for file, pieces_of_split in zip(files, pieces, strict=True):
                file.write(b"".join(pieces_of_split))
            for row in calibration_rows[slice(*np.searchsorted(calibration_rows, (block.first, end)))].tolist():
                cut = selection.cut.get(row)
                calibration[selection.calibration[row]] = cut.line + b"\n" if cut else bytes(block.line(row))
            if number % 16 == 0:
                job.progress(block.first, total, "rows", "writing")
    (out / "calibration.jsonl").write_bytes(b"".join(calibration))
    job.progress(total, total, "rows", "written")


def write_preferences(parsed: ParsedRows, selection: Selection, out: Path, quarantine: IO[bytes]) -> int:
    """Writes preference.jsonl, if there are preference rows, and returns their number.

    Rows with a held-out question go to quarantine.
    """
    if not parsed.preferences.rows:
        return 0
    good = selection.good
    held_out = set(good.filter(pl.col("split") == "test")["question"].to_list())
    written = 0
    with parsed.preferences.path.open("rb") as lines, (out / "preference.jsonl").open("wb") as file:
        for line, (number, row, question) in zip(lines, parsed.preferences.rows, strict=True):
            if question in held_out:
                reason = "the same question is held out, so preference must not hold it"
                entry = {"file": parsed.files[number][0], "line": row, "reason": reason, "raw": line.decode().strip()}
                quarantine.write(orjson.dumps(entry) + b"\n")
            else:
                file.write(line)
                written += 1
    return written


def copy_quarantine_to_report(out: Path) -> None:
    """Copies the first 4 MB of the quarantine to the report's files, which MLflow gets even where the stage fails."""
    with (out / "quarantine.jsonl").open("rb") as quarantine:
        if lines := quarantine.readlines(REPORT_BYTES):
            (out / "report").mkdir(exist_ok=True)
            (out / "report" / "quarantine.jsonl").write_bytes(b"".join(lines))


def _codes(good: pl.DataFrame, total: int) -> NDArray[np.uint8]:
    """(total,) the index of each good row's split; QUARANTINED for all others."""
    codes = np.full(total, QUARANTINED, dtype=np.uint8)
    indices = good["split"].replace_strict({name: i for i, name in enumerate(SPLITS)}, return_dtype=pl.UInt8)
    codes[good["row"].to_numpy()] = indices.to_numpy()
    return codes


def _runs(codes: NDArray[np.uint8]) -> Iterator[tuple[int, int, int]]:
    """Start, stop and code of each run of equal codes."""
    borders = [0, *(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist(), len(codes)]
    yield from ((start, stop, int(codes[start])) for start, stop in pairwise(borders))


def _line_blocks(parsed: ParsedRows) -> Iterator[LineBlock]:
    """The first pass's files of canonical lines that have rows."""
    sizes, first = parsed.rows["bytes"].to_numpy(), 0
    for path, count in zip(parsed.line_files, parsed.line_counts, strict=True):
        if count:  # a block may have nothing but faulty rows
            ends = np.cumsum(sizes[first : first + count], dtype=np.int64)
            yield LineBlock(first, np.concatenate([[0], ends[:-1]]), ends, memoryview(path.read_bytes()))
        first += count
