"""Second pass: canonical lines go to the split that their verdict says, or to quarantine with its reason."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.core.job import Job
from tasks.ingest.profile import SPLITS
from tasks.ingest.reasons import Reasons
from tasks.ingest.row_selection import Judged
from tasks.ingest.stage import Staged

SHOWN_BYTES = 4_000_000
QUARANTINED, CUT = len(SPLITS), len(SPLITS) + 1  # a row's code is its split's place in SPLITS, or one of these


def write_splits(staged: Staged, judged: Judged, reasons: Reasons, out: Path, quarantine: IO[bytes], job: Job) -> None:
    """Writes train, validation, test and calibration.jsonl; `reasons` says why a row is not good.

    Neighbours that go the same way are copied together, without a look at their lines.
    """
    codes = _codes(judged.good, staged.rows.height)
    split_of_cut = {row: int(codes[row]) for row in judged.cut}
    codes[list(judged.cut)] = CUT
    chosen: list[bytes] = [b""] * len(judged.calibration)
    picked = np.array(sorted(judged.calibration), dtype=np.int64)
    with ExitStack() as stack:
        files = [stack.enter_context((out / f"{name}.jsonl").open("wb")) for name in SPLITS]
        for number, (first, ends, data) in enumerate(_staged_blocks(staged)):
            starts, here = np.concatenate([[0], ends[:-1]]), codes[first : first + len(ends)]
            pieces: list[list[bytes | memoryview]] = [[] for _ in SPLITS]
            borders = [0, *(np.flatnonzero(here[1:] != here[:-1]) + 1).tolist(), len(here)]
            for left, right in pairwise(borders):
                code = here[left]
                if code < QUARANTINED:
                    pieces[code].append(data[starts[left] : ends[right - 1]])
                    continue
                for row in range(first + left, first + right):
                    if code == CUT:
                        pieces[split_of_cut[row]].append(judged.cut[row][0] + b"\n")
                    else:
                        quarantine.write(
                            reasons.quarantined(row, bytes(data[starts[row - first] : ends[row - first] - 1]))
                        )
            for file, of_split in zip(files, pieces, strict=True):
                file.write(b"".join(of_split))
            for row in picked[slice(*np.searchsorted(picked, (first, first + len(ends))))].tolist():
                line = (
                    judged.cut[row][0] + b"\n" if row in judged.cut else data[starts[row - first] : ends[row - first]]
                )
                chosen[judged.calibration[row]] = bytes(line)
            if number % 16 == 0:
                job.progress(first, staged.rows.height, "rows", "writing")
    (out / "calibration.jsonl").write_bytes(b"".join(chosen))
    job.progress(staged.rows.height, staged.rows.height, "rows", "written")


def show_quarantine(out: Path) -> None:
    """Puts the quarantine's first rows among the report's files, which are seen even where the stage then fails."""
    with (out / "quarantine.jsonl").open("rb") as quarantine:
        if lines := quarantine.readlines(SHOWN_BYTES):
            (out / "report").mkdir(exist_ok=True)
            (out / "report" / "quarantine.jsonl").write_bytes(b"".join(lines))


def _codes(good: pl.DataFrame, total: int) -> NDArray[np.uint8]:
    codes = np.full(total, QUARANTINED, dtype=np.uint8)
    places = good["split"].replace_strict({name: i for i, name in enumerate(SPLITS)}, return_dtype=pl.UInt8)
    codes[good["row"].to_numpy()] = places.to_numpy()
    return codes


def _staged_blocks(staged: Staged) -> Iterator[tuple[int, NDArray[np.int64], memoryview]]:
    """Each file of the first pass that has rows: the number of its first row, where its lines end, and its bytes."""
    sizes, first = staged.rows["bytes"].to_numpy(), 0
    for path, rows in zip(staged.lines, staged.counts, strict=True):
        if rows:  # a block may have nothing but faulty rows
            yield first, np.cumsum(sizes[first : first + rows], dtype=np.int64), memoryview(path.read_bytes())
        first += rows
