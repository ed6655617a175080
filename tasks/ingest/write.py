"""Second pass: canonical lines go to the split that their verdict says, or to quarantine with its reason."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import orjson
import polars as pl

from tasks.core.job import Job
from tasks.ingest.judge import Judged
from tasks.ingest.profile import SPLITS
from tasks.ingest.stage import Staged, staged_lines

QUARANTINED, SPECIAL = 3, 4  # codes of a row beside its split's place in SPLITS: out, and more than one thing to do
EVERY = 100_000


def write_splits(
    staged: Staged, judged: Judged, reason: Callable[[int], str], out: Path, quarantine: IO[bytes], job: Job
) -> None:
    """Writes train, validation, test and calibration.jsonl; `reason` says why a row is not good."""
    rows, calibration, cut = judged.good, judged.calibration, judged.cut
    total = staged.rows.height
    codes = np.full(total, QUARANTINED, dtype=np.uint8)
    place = rows["split"].replace_strict({name: i for i, name in enumerate(SPLITS)}, return_dtype=pl.UInt8)
    codes[rows["row"].to_numpy()] = place.to_numpy()
    special = {row: int(codes[row]) for row in {*calibration, *cut}}
    codes[list(special)] = SPECIAL
    chosen: list[bytes] = [b""] * len(calibration)
    with ExitStack() as stack:
        files = [stack.enter_context((out / f"{name}.jsonl").open("wb", buffering=1 << 20)) for name in SPLITS]
        writes = [file.write for file in files]
        for row, (line, code) in enumerate(zip(staged_lines(staged.lines), codes.tobytes(), strict=True)):
            if code < QUARANTINED:
                writes[code](line)
            elif code == QUARANTINED:
                quarantine.write(_quarantined(staged, row, reason(row), line))
            else:
                line = cut[row][0] + b"\n" if row in cut else line
                writes[special[row]](line)
                if row in calibration:
                    chosen[calibration[row]] = line
            if row % EVERY == 0:
                job.progress(row, total, "rows", "writing")
    (out / "calibration.jsonl").write_bytes(b"".join(chosen))
    job.progress(total, total, "rows", "written")


def _quarantined(staged: Staged, row: int, reason: str, line: bytes) -> bytes:
    """The row as it was understood: its canonical line stands for what was found."""
    file, number = staged.rows["file"][row], staged.rows["line"][row]
    told = {"file": staged.files[file][0], "line": number, "reason": reason, "raw": line.rstrip().decode()}
    return orjson.dumps(told) + b"\n"
