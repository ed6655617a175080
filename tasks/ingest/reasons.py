"""Why a row that could be read is not in a split, in words."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import orjson
import polars as pl

from tasks.ingest.stage import Staged

FAULTS = ("", "not_json", "schema", "over_long", "leak", "duplicate", "near_duplicate", "conflict")


class Found(NamedTuple):
    """What `verdict` and `lengths` found: `faults` (row, fault, other), words by kind of answer, `tokens` by row."""

    faults: pl.DataFrame
    odd: Mapping[int, str]
    tokens: Mapping[int, int]
    max_length: int


class Reasons:
    """Says of a row's number why the row is in quarantine; five bytes a row, and the staged columns as they lie."""

    def __init__(self, staged: Staged, found: Found, splits: pl.DataFrame) -> None:
        self._files, self._found = staged.files, found
        columns = (staged.rows[name].to_numpy() for name in ("file", "line", "kind", "question"))
        self._file, self._line, self._kind, self._question = columns
        self._fault = np.zeros(staged.rows.height, dtype=np.uint8)
        self._other = np.zeros(staged.rows.height, dtype=np.uint32)
        rows = found.faults["row"].to_numpy()
        codes = {name: code for code, name in enumerate(FAULTS)}
        self._fault[rows] = found.faults["fault"].replace_strict(codes, return_dtype=pl.UInt8).to_numpy()
        self._other[rows] = found.faults["other"].fill_null(0).to_numpy()
        leaks = found.faults.filter(pl.col("fault") == "leak")
        self._split = dict(leaks.join(splits, on="row").select("row", "split").iter_rows())

    def __call__(self, row: int) -> str:
        """The reason."""
        fault, other = FAULTS[self._fault[row]], int(self._other[row])
        if fault == "schema":
            return self._found.odd[int(self._kind[row])]
        if fault == "over_long":
            return f"{self._found.tokens[row]} tokens, more than max_length={self._found.max_length}"
        if fault == "not_json":
            return "the answer should be a JSON object, as most answers are, and is not"
        almost = "" if self._question[row] == self._question[other] else "almost "
        if fault == "leak":
            split = self._split[row]
            return f"{almost}the same question is held out ({self.where(other)}), so {split} must not hold it"
        return {
            "duplicate": f"duplicate of {self.where(other)}",
            "near_duplicate": f"almost a duplicate of {self.where(other)}: nearly its question, and its answer",
            "conflict": f"the same question has another answer at {self.where(other)}; keep the right one",
        }[fault]

    def where(self, row: int) -> str:
        """File and line of a row."""
        return f"{self._files[self._file[row]][0]}:{self._line[row]}"

    def quarantined(self, row: int, line: bytes) -> bytes:
        """The row as it was understood, for quarantine.jsonl: its canonical line stands for what was found."""
        file, number = self._files[self._file[row]][0], int(self._line[row])
        return orjson.dumps({"file": file, "line": number, "reason": self(row), "raw": line.decode()}) + b"\n"
